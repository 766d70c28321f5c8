"""Translates tcgen05, the products of sm_100, and what these share with bulk copies: elect and mbarrier.

What an instruction does is in mbarrier, bulk, tensor and tensor_products; here it becomes a call.
"""

import re

from .operations import Operations, address

# Copies of boxes within a program, which has its cluster to itself: their dimensions, and what follows.
COPY = re.compile(
    r"async\.bulk\.tensor\.([1-5])d\.(?:tile\.)?"
    r"(?:(shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes)|global\.shared::cta\.bulk_group)"
)


class TensorOperations(Operations):
    """Bulk copies, tensor memory, and the barriers that copies and products arrive at."""

    def op_elect(self, *kinds):
        if kinds != ("sync",):
            raise self.unknown()
        registers, members = self.instruction.operands
        self.count += 2
        names = f"v{self.count - 1}", f"v{self.count}"
        self.lines.append(f"{names[0]}, {names[1]} = elect(b, {self.get(members, 'u4')}, {self.here})")
        for register, name, kind in zip(registers.split("|"), names, ("u4", "b1"), strict=True):
            self.put(register.strip(), kind, name)

    def op_mbarrier(self, *kinds):
        each, mask, here = self.instruction, self.mask(), self.here
        known = {("init",): 2, ("inval",): 1, ("arrive", "expect_tx"): 3, ("try_wait", "parity"): 3}
        if kinds[-2:] != ("shared::cta", "b64") or known.get(kinds[:-2]) != len(each.operands):
            raise self.unknown()
        place, offset = self.shared_address(each.operands[len(kinds) == 4])
        if kinds[0] == "init":
            count = self.get(each.operands[1], "u4")
            self.lines.append(f"barrier_init(b, {place}, {offset}, {count}, {mask}, {here})")
        elif kinds[0] == "inval":
            self.lines.append(f"barrier_inval(b, {place}, {offset}, {mask}, {here})")
        elif kinds[0] == "arrive":
            if each.operands[0] != "_":
                raise self.unknown()
            expected = self.get(each.operands[2], "u4")
            self.lines.append(f"barrier_arrive(b, {place}, {offset}, {expected}, {mask}, {here})")
        elif each.guard:
            raise self.unknown()
        else:
            parity = self.get(each.operands[2], "u4")
            self.put(each.operands[0], "b1", self.variable(f"barrier_wait(b, {place}, {offset}, {parity}, {here})"))

    def op_cvta(self, *kinds):
        """The generic address of a tensor map, which is the one that it has here."""
        register, token = self.instruction.operands
        if kinds != ("param", "u64"):
            raise self.unknown()
        self.put(register, "u8", self.get(token, "u8"))

    def op_cp(self, *kinds):
        each, text = self.instruction, ".".join(kinds)
        if kinds[:2] != ("async", "bulk"):
            super().op_cp(*kinds)
        elif text == "async.bulk.commit_group" and not each.guard:
            self.lines.append("bulk_commit(b)")
        elif text in ("async.bulk.wait_group", "async.bulk.wait_group.read") and not each.guard:
            self.lines.append(f"bulk_wait(b, {int(each.operands[0], 0)})")
        elif (found := COPY.fullmatch(text)) and len(each.operands) == (3 if found[2] else 2):
            self.bulk_copy(int(found[1]), bool(found[2]))
        else:
            raise self.unknown()

    def bulk_copy(self, dimensions, inward):
        operands = self.instruction.operands
        place = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]", operands[1 if inward else 0])
        indices = [token.strip() for token in place[2].split(",")] if place else []
        if len(indices) != dimensions:
            raise self.unknown()
        coordinates = " ".join(self.get(token, "i4") + "," for token in indices)
        tensor_map, end = f"{self.get(place[1], 'u8')}, ({coordinates})", f"{self.mask()}, {self.here})"
        shared, offset = self.shared_address(operands[0 if inward else 1])
        if inward:
            barrier, by = self.shared_address(operands[2])
            self.lines.append(f"bulk_load(b, {shared}, {offset}, {tensor_map}, {barrier}, {by}, {end}")
        else:
            self.lines.append(f"bulk_store(b, {shared}, {offset}, {tensor_map}, {end}")

    def op_tcgen05(self, *kinds):
        each, mask, here = self.instruction, self.mask(), self.here
        text, operands = ".".join(kinds), each.operands
        if self.loading and kinds[0] not in ("ld", "wait::ld"):
            raise self.unknown("before tcgen05.wait::ld of an earlier load")
        if text == "alloc.cta_group::1.sync.aligned.shared::cta.b32":
            place, offset = self.shared_address(operands[0])
            self.lines.append(f"tensor_alloc(b, {place}, {offset}, {self.columns(operands[1])}, {mask}, {here})")
        elif text == "relinquish_alloc_permit.cta_group::1.sync.aligned":
            self.lines.append(f"tensor_relinquish(b, {mask}, {here})")
        elif text == "dealloc.cta_group::1.sync.aligned.b32":
            place = self.get(operands[0], "u4")
            self.lines.append(f"tensor_dealloc(b, {place}, {self.columns(operands[1])}, {mask}, {here})")
        elif text == "commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64":
            place, offset = self.shared_address(operands[0])
            self.lines.append(f"tensor_commit(b, {place}, {offset}, {mask}, {here})")
        elif kinds[:2] == ("mma", "cta_group::1"):
            self.tensor_product(kinds[2:], mask)
        elif kinds[0] == "st":
            shape, split = self.tensor_shape("st", text, operands[1:-1], operands[-1])
            values = " ".join(self.get(token, "u4") + "," for token in operands[-1])
            place = self.tensor_address(operands[0])
            self.lines.append(f"tensor_store(b, {place}, {shape!r}, ({values}), {split}, {mask}, {here})")
        elif each.guard:
            raise self.unknown()
        elif text == "wait::st.sync.aligned":
            self.lines.append(f"tensor_wait_store(b, {here})")
        elif text == "wait::ld.sync.aligned":
            self.loading.clear()
        elif kinds[0] == "ld":
            self.tensor_load(text)
        else:
            raise self.unknown()

    def columns(self, token):
        """A number of columns to allocate."""
        if token not in ("32", "64", "128", "256", "512"):
            raise self.unknown()
        return int(token)

    def tensor_address(self, token):
        base, offset = address(token)
        return f"{self.get(base, 'u4')} + {self.parent.constant(offset, 'u4')}"

    def tensor_shape(self, name, text, split, registers):
        """(shape, offset of its second half) from the modifiers and operands of a load or a store."""
        found = re.fullmatch(rf"{name}\.sync\.aligned\.(32x32b|16x32bx2)\.x(4|8|16|32|64|128)\.b32", text)
        if not found or len(registers) != int(found[2]) or len(split) != (found[1] == "16x32bx2"):
            raise self.unknown()
        return found[1], int(split[0], 0) if split else 0

    def tensor_load(self, text):
        registers, place, *split = self.instruction.operands
        shape, split = self.tensor_shape("ld", text, split, registers)
        form = self.parent.forms[self.parent.index[registers[0]]]
        self.count += len(registers)
        names = [f"v{self.count - k}" for k in range(len(registers))]
        call = f"tensor_load(b, {self.tensor_address(place)}, {shape!r}, {len(names)}, {split}, {form}, {self.here})"
        self.lines.append(f"{', '.join(names)} = {call}")
        for register, name in zip(registers, names):
            self.put(register, form, name)
            self.loading[register] = self.instruction

    def tensor_product(self, kinds, mask):
        operands = self.instruction.operands
        if kinds not in (("kind::f16",), ("kind::tf32",)) or len(operands) != 5:
            raise self.unknown()
        in_tensor = operands[1][0] == "["
        a = self.tensor_address(operands[1]) if in_tensor else self.get(operands[1], "u8")
        b, descriptor, keep = (self.get(token, form) for token, form in zip(operands[2:], ("u8", "u4", "b1")))
        d = self.tensor_address(operands[0])
        places = f"{d}, {a}, {in_tensor}, {b}"
        call = f"tensor_product(b, {kinds[0][6:]!r}, {places}, {descriptor}, {keep}, {mask}, {self.here})"
        self.lines.append(call)
