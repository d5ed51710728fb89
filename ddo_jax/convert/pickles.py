"""Pickles as data: an interpreter of the few opcodes that checkpoints use. It imports and calls nothing of the file.

    loads(data) -> value        # NumPy statistics; torch's containers are in torch_files.py, on the same Machine

Globals are names, never objects. Three things can happen to one:

    allowed     the names in `inert.HANDLERS`, from the specifications: our own inert code runs
    inert       a class, by its capital letter, of torch, torch_utils or dnnlib: its instances become a `Stub`
    refused     everything else (os.system, builtins.eval, copyreg, torch.hub.load ...), by name

Limits, shared by all pickles nested in one file (`Budget`): opcodes; bytes copied into arrays, a small multiple of the
file; depth; no cycles. Every opcode costs O(1) or is charged, so time and memory are linear in the file and bounded.
Dictionary keys are short strings and 64-bit numbers: nobody can choose keys that collide. Protocols 2 to 5 as written
by CPython; the text opcodes of protocols 0 and 1 do not occur in released files and are refused.
"""

import pickletools
import re
import struct

from ddo_jax.convert.inert import (
    HANDLERS,
    Budget,
    Dtype,
    Global,
    NumpyArray,
    Record,
    Stub,
    Tensor,
    Text,
    UnsafeOrDamaged,
    arguments,
    from_raw,
    key,
    show,
)

__all__ = ["Machine", "UnsafeOrDamaged", "check_graph", "loads", "plain", "reference"]

MAX_DEPTH = 100
SHORT = 4096  # longer strings and bytes stay views of the file: embedded source text is not even decoded
BAD_PICKLE = (IndexError, KeyError, TypeError, AttributeError, ValueError, OverflowError, struct.error)


def reference(module: str, name: str) -> Global:
    """The global `module.name` if it is allowed or inert.

    Raises:
      UnsafeOrDamaged: any other; names it.
    """
    full = f"{module}.{name}"
    if full in HANDLERS:
        return Global(full, inert=False)
    # Functions are refused even there, although nothing would run: a checkpoint has no business with them.
    if full == "argparse.Namespace":  # the flags of a trainer, beside its weights
        return Global(full, inert=True)
    if re.fullmatch(r"(torch|torch_utils|dnnlib)(\.\w+)*", module, re.A) and re.fullmatch(r"_?[A-Z]\w*", name, re.A):
        return Global(full, inert=True)
    raise UnsafeOrDamaged(f"global {show(full)} is not allowed in a checkpoint; nothing of the file was executed")


# ----------------------------------------------------------------------------------------------------
# The interpreter


class Machine:
    """Runs one pickle from `start`; afterwards `position` is the byte behind its STOP.

    Args:
      data: the file. budget: shared by all pickles of the file.
      persistent: persistent id -> value; None: they are refused.
      load_bytes: (blob, budget) -> Storage, for torch's streams in NVIDIA's pickles; None: refused.
    """

    def __init__(self, data, budget: Budget, *, start: int = 0, persistent=None, load_bytes=None):
        self.data, self.budget, self.position = memoryview(data), budget, start
        self.persistent, self.load_bytes = persistent, load_bytes
        self.stack, self.marks, self.memo = [], [], {}

    def run(self):
        """The value on the stack at STOP, not yet checked by `check_graph`.

        Raises:
          UnsafeOrDamaged: with the byte at which it happened.
        """
        at = self.position
        try:
            while True:
                at = self.position
                self.budget.work(1)
                opcode = self.take(1)[0]
                if opcode == _STOP:
                    break
                if opcode not in ACTIONS:
                    raise UnsafeOrDamaged(f"opcode {_opcode_name(opcode)} does not occur in checkpoints")
                ACTIONS[opcode](self)
            (value,) = self.stack
            if self.marks:
                raise UnsafeOrDamaged("STOP inside an unfinished list")
            return value
        except UnsafeOrDamaged as e:
            raise UnsafeOrDamaged(f"byte {at}: {e}") from None
        except BAD_PICKLE as e:  # an empty stack, an unknown memo index, a wrong type, invalid UTF-8
            raise UnsafeOrDamaged(f"byte {at}: damaged pickle ({type(e).__name__})") from None

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.position
        if size > left:
            raise UnsafeOrDamaged(f"truncated or damaged: {size} bytes wanted, {left} left")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, fmt: str) -> int | float:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def line(self) -> str:
        """Up to the next newline, which must be near."""
        text, newline, _ = bytes(self.data[self.position : self.position + 256]).partition(b"\n")
        if not newline:
            raise UnsafeOrDamaged("a name without an end")
        self.position += len(text) + 1
        return text.decode("utf-8")

    def pop(self):
        return self.stack.pop()

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self):
        self.marks.append(self.stack)
        self.stack = []


def _push(read):
    return lambda m: m.stack.append(read(m))


def _text(fmt):
    def read(m):
        view = m.take(m.number(fmt))
        return Text(view) if len(view) > SHORT else str(view, "utf-8")

    return _push(read)


def _bytes(fmt):
    def read(m):
        view = m.take(m.number(fmt))
        return view if len(view) > SHORT else bytes(view)

    return _push(read)


def _long(m):
    size = m.number("<B")
    if size > 16:  # huge integers make quadratic work of what follows
        raise UnsafeOrDamaged(f"an integer of {size} bytes")
    return int.from_bytes(m.take(size), "little", signed=True)


def _tuple(count):
    return _push(lambda m: tuple([m.pop() for _ in range(count)][::-1]))


def _put(fmt):
    def put(m):
        m.memo[m.number(fmt) if fmt else len(m.memo)] = m.stack[-1]

    return put


def _get(fmt):
    return _push(lambda m: m.memo[m.number(fmt)])


def _frame(m):
    size, left = m.number("<Q"), len(m.data) - m.position
    if size > left:
        raise UnsafeOrDamaged(f"truncated: a frame of {size} bytes, {left} left")


def _proto(m):
    version = m.number("<B")
    if not 2 <= version <= 5:
        raise UnsafeOrDamaged(f"pickle protocol {version}; allowed: 2 to 5")


def _stack_global(m):
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise UnsafeOrDamaged("a global whose name is not a short string")
    return reference(module, name)


def _target(m, kind: type):
    if type(m.stack[-1]) is not kind:
        raise UnsafeOrDamaged(f"items for a {type(m.stack[-1]).__name__}; wanted a {kind.__name__}")
    return m.stack[-1]


def _set_items(m, items=None):
    items = m.pop_mark() if items is None else items
    if len(items) % 2:
        raise UnsafeOrDamaged("a dictionary key without a value")
    _target(m, dict).update((key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))


def _set_item(m):
    value, k = m.pop(), m.pop()
    _set_items(m, [k, value])


def _append(m):
    value = m.pop()
    _target(m, list).append(value)


def _appends(m):
    items = m.pop_mark()
    _target(m, list).extend(items)


def _add_items(m):
    items = m.pop_mark()
    _target(m, set).update(key(v) for v in items)


def _call(m):
    """REDUCE and NEWOBJ: no difference to inert code."""
    args, function = m.pop(), m.pop()
    if type(function) is not Global or type(args) is not tuple:
        raise UnsafeOrDamaged(f"a call of {type(function).__name__} with {type(args).__name__}")
    if function.inert:
        return Stub(function.name, args)
    try:
        return HANDLERS[function.name](m, args)
    except UnsafeOrDamaged as e:
        raise UnsafeOrDamaged(f"{function.name}: {e}") from None


def _build(m):
    """Set the state of the object below, once: in O(1), and no dictionary is merged into another."""
    state, target = m.pop(), m.stack[-1]
    if type(target) is dict:
        return  # attributes of an OrderedDict (`_metadata`) or EasyDict: nothing needs them
    if type(target) is Stub and target.state is None:
        target.state = state
    elif type(target) is Dtype and target.order is None and type(state) is tuple and state[1] in ("<", ">", "|", "="):
        target.order = state[1]
    elif type(target) is NumpyArray and target.value is None and type(state) is tuple:
        _, shape, dtype, fortran, raw = arguments(state, (int,), (tuple,), (Dtype,), (bool, int), (bytes, memoryview))
        target.value = from_raw(m.budget, dtype, shape, raw, order="F" if fortran else "C")
    else:
        raise UnsafeOrDamaged(f"a state for a {type(target).__name__}")


def _persistent(m):
    if m.persistent is None:
        raise UnsafeOrDamaged("a persistent id; only torch files have them")
    return m.persistent(m.pop())


_STOP = ord(".")
ACTIONS = {
    **{ord("\x80"): _proto, 0x95: _frame, ord("("): Machine.mark},
    **{ord("N"): _push(lambda m: None), 0x88: _push(lambda m: True), 0x89: _push(lambda m: False)},
    **{ord("J"): _push(lambda m: m.number("<i")), ord("K"): _push(lambda m: m.number("<B"))},
    **{ord("M"): _push(lambda m: m.number("<H")), 0x8A: _push(_long), ord("G"): _push(lambda m: m.number(">d"))},
    **{0x8C: _text("<B"), ord("X"): _text("<I"), 0x8D: _text("<Q")},
    **{ord("C"): _bytes("<B"), ord("B"): _bytes("<I"), 0x8E: _bytes("<Q")},
    **{ord("}"): _push(lambda m: {}), ord("]"): _push(lambda m: []), 0x8F: _push(lambda m: set())},
    **{ord(")"): _tuple(0), 0x85: _tuple(1), 0x86: _tuple(2), 0x87: _tuple(3)},
    ord("t"): lambda m: (lambda items: m.stack.append(tuple(items)))(m.pop_mark()),
    **{ord("a"): _append, ord("e"): _appends, ord("s"): _set_item, ord("u"): _set_items, 0x90: _add_items},
    **{ord("q"): _put("<B"), ord("r"): _put("<I"), 0x94: _put(None), ord("h"): _get("<B"), ord("j"): _get("<I")},
    ord("c"): _push(lambda m: reference(m.line(), m.line())),
    **{0x93: _push(_stack_global), ord("R"): _push(_call), 0x81: _push(_call), ord("b"): _build},
    ord("Q"): _push(_persistent),
}


def _opcode_name(code: int) -> str:
    info = pickletools.code2op.get(chr(code))
    return info.name if info else f"0x{code:02x}"


# ----------------------------------------------------------------------------------------------------
# The finished value


def _children(node):
    if type(node) is dict:
        return node.values()
    if type(node) is Record:
        return (node.state,)
    if type(node) is Stub:
        return (node.args, node.state)
    return node


def check_graph(root):
    """Refuse cycles and nesting deeper than MAX_DEPTH, so that what follows may recurse; O(size), iterative."""
    heights, open_ids = {}, {id(root)}
    path = [[root, iter(_children(root)), 0]] if type(root) in _CONTAINERS else []
    while path:
        frame = path[-1]
        for child in frame[1]:
            if type(child) not in _CONTAINERS:
                continue
            if id(child) in open_ids:
                raise UnsafeOrDamaged(f"a {type(child).__name__} contains itself")
            if id(child) not in heights:
                path.append([child, iter(_children(child)), 0])
                open_ids.add(id(child))
                break
            frame[2] = max(frame[2], heights[id(child)])
        else:
            path.pop()
            open_ids.remove(id(frame[0]))
            heights[id(frame[0])] = height = frame[2] + 1
            if path:
                path[-1][2] = max(path[-1][2], height)
        if len(path) + (frame[2] if path else 0) > MAX_DEPTH:
            raise UnsafeOrDamaged(f"nested deeper than {MAX_DEPTH}")


_CONTAINERS = (dict, list, tuple, Record, Stub)


def plain(value, budget: Budget):
    """`value` with tensors and NumPy arrays as arrays; only plain containers besides.

    Raises:
      UnsafeOrDamaged: something else is inside.
    """
    budget.work(1)  # shared parts are copied: a memo bomb ends here
    if type(value) in (NumpyArray, Tensor):
        return value.array()
    if type(value) is dict:
        return {k: plain(v, budget) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(v, budget) for v in value)
    if type(value) in (str, int, float, bool, bytes, type(None), set):
        return value
    raise UnsafeOrDamaged(f"a {type(value).__name__} where plain values and arrays are wanted")


def loads(data):
    """A pickle of plain values and NumPy arrays, such as the reference statistics (specs/metrics.md section 7).

    Raises:
      UnsafeOrDamaged: anything else.
    """
    budget = Budget(len(data))
    machine = Machine(data, budget)
    value = machine.run()
    if machine.position != len(data):
        raise UnsafeOrDamaged(f"{len(data) - machine.position} bytes behind the end of the pickle")
    check_graph(value)
    return plain(value, budget)
