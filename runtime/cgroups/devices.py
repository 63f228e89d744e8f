"""Device rules: their v1 text, and the v2 eBPF program that says the same. Pure.

A rule list is read like the specification says: later rules win. On v1 the kernel keeps a default (allow or deny)
and exceptions, which `a` rules reset. On v2 a program of type CGROUP_DEVICE answers for each access; it tests the
rules from the last to the first, and the first that matches decides.
"""

from __future__ import annotations

import struct

from runtime.spec.resources import DeviceRule
from runtime.values import replace

_ACCESS = {"m": 1, "r": 2, "w": 4}
_TYPE = {"b": 1, "c": 2}


def v1_text(rule: DeviceRule) -> str:
    """Return what devices.allow and devices.deny read, such as `c 1:3 rwm`."""
    if rule.type == "a":
        return "a"
    major, minor = ("*" if n is None else str(n) for n in (rule.major, rule.minor))
    return f"{rule.type} {major}:{minor} {rule.access}"


def v1_rules(rules: tuple[DeviceRule, ...]) -> list[tuple[bool, str]]:
    """Return (allow, text) for each rule, in order."""
    return [(rule.allow, v1_text(rule)) for rule in rules]


def merged(rules: tuple[DeviceRule, ...]) -> list[DeviceRule]:
    """Join what several rules allow of one device, where no denial stands between them: one open asks for all of it."""
    found: list[DeviceRule] = []
    since = 0  # the first rule after the last denial
    for rule in rules:
        same = (rule.allow, rule.type, rule.major, rule.minor)
        twins = [i for i in range(since, len(found)) if (found[i].allow, found[i].type, found[i].major, found[i].minor) == same]
        if rule.allow and twins:
            access = "".join(sorted({*found[twins[0]].access, *rule.access}))
            found[twins[0]] = replace(found[twins[0]], access=access)
            continue
        found.append(rule)
        if not rule.allow:
            since = len(found)
    return found


def _insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    return struct.pack("<BBhI", code, dst | src << 4, off, imm & 0xFFFFFFFF)


def v2_program(rules: tuple[DeviceRule, ...]) -> bytes:
    """Return the eBPF instructions for a rule list; without a matching rule access is denied.

    Registers: r1 the context (u32 access_type: access << 16 | type; u32 major; u32 minor), then r2 type, r3 access,
    r4 major, r5 minor.
    Source: include/uapi/linux/bpf.h, struct bpf_cgroup_dev_ctx.
    """
    ldx_w, and_imm, rsh_imm, mov_imm, mov_reg, exit_ = 0x61, 0x57, 0x77, 0xB7, 0xBF, 0x95
    jne_imm, jeq_imm, jne_reg = 0x56, 0x16, 0x5E  # 32 bits: an immediate would be sign-extended to 64
    program = [
        _insn(ldx_w, 2, 1, 0), _insn(and_imm, 2, imm=0xFFFF),
        _insn(ldx_w, 3, 1, 0), _insn(rsh_imm, 3, imm=16),
        _insn(ldx_w, 4, 1, 4), _insn(ldx_w, 5, 1, 8),
    ]  # fmt: skip
    for rule in reversed(merged(rules)):
        answer = [_insn(mov_imm, 0, imm=int(rule.allow)), _insn(exit_)]
        tests: list[bytes] = []  # each jumps over the rest of this rule; offsets are patched below
        if rule.type != "a":
            tests.append(_insn(jne_imm, 2, imm=_TYPE[rule.type]))
        access = sum(_ACCESS[a] for a in set(rule.access) if a in _ACCESS)
        body: list[tuple[bytes, bool]] = [(t, True) for t in tests]
        if access != 7:
            # An allow rule must cover all that is asked; a deny rule matches where any of it is asked.
            body.append((_insn(mov_reg, 1, 3), False))
            body.append((_insn(and_imm, 1, imm=access), False))
            if rule.allow:
                body.append((_insn(jne_reg, 1, 3), True))
            else:
                body.append((_insn(jeq_imm, 1, imm=0), True))
        if rule.major is not None:
            body.append((_insn(jne_imm, 4, imm=rule.major), True))
        if rule.minor is not None:
            body.append((_insn(jne_imm, 5, imm=rule.minor), True))
        length = len(body) + len(answer)
        for i, (raw, jumps) in enumerate(body):
            code, regs, _, imm = struct.unpack("<BBhI", raw)
            program.append(struct.pack("<BBhI", code, regs, length - i - 1 if jumps else 0, imm))
        program += answer
        if rule.type == "a" and access == 7 and rule.major is None and rule.minor is None:
            return b"".join(program)  # nothing before an unconditional rule counts
    program += [_insn(mov_imm, 0, imm=0), _insn(exit_)]
    return b"".join(program)
