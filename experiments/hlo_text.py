"""Reads the text of a compiled program (`Compiled.as_text()`).

A program is computations, each a list of instructions, one of them the entry;
loops, fusions, calls and conditionals run others. `executions` says how often
each runs per call of the program.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

_COMPUTATION = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([^\s]+) = ')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_BRACKET = re.compile(r'[()]')
_COMMENT = re.compile(r'/\*.*?\*/')
_SHAPE = re.compile(r'\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LOOP = re.compile(r'condition=%?([\w.\-]+), body=%?([\w.\-]+)')
_CALLED = re.compile(
  r'(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)'
)
# Instructions that only run others, on arrays in memory.
CONTROL = ('while', 'conditional', 'call', 'call-start', 'async-start')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of an array: bits of an element, shape, and layout as written."""

  bits: int
  shape: tuple[int, ...]
  layout: str

  @property
  def elements(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Bytes without padding."""
    return -(-self.elements * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line `%name = type opcode(operands), attributes`."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """The name of the entry, and the instructions of every computation."""

  entry: str
  computations: Mapping[str, tuple[Instruction, ...]]


def arrays(type_text: str) -> list[Array]:
  """Returns the arrays of a type, those of a tuple in their order."""
  return [
    Array(
      8 if name == 'pred' else int(width),
      tuple(int(n) for n in shape.split(',') if n),
      layout or '',
    )
    for name, width, shape, layout in _SHAPE.findall(type_text)
  ]


def num_bytes(type_text: str) -> int:
  """Returns the bytes of all arrays of a type."""
  return sum(array.bytes for array in arrays(type_text))


def elements(type_text: str) -> list[str]:
  """Returns the elements of a tuple's type, or the type of an array alone."""
  if not type_text.startswith('('):
    return [type_text]
  found, depth, start = [], 0, 1
  for i, letter in enumerate(type_text):
    depth += (letter in '([{') - (letter in ')]}')
    if depth == 1 and letter == ',' or depth == 0:
      found.append(type_text[start:i].strip())
      start = i + 1
  return found


def _closing(text: str, start: int) -> int:
  """Returns the end of the bracketed text that opens at `start`."""
  depth = 0
  for match in _BRACKET.finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  raise ValueError(f'a bracket is not closed in {text!r}')


def _instruction(line: str) -> Instruction | None:
  head = _INSTRUCTION.match(line)
  if head is None:
    return None
  line = _COMMENT.sub('', line)
  start = head.end()
  is_tuple = line[start] == '('
  end = _closing(line, start) if is_tuple else line.index(' ', start)
  opcode = _OPCODE.match(line, end)
  if opcode is None:
    raise ValueError(f'no instruction is read from {line.strip()!r}')
  close = _closing(line, opcode.end() - 1)
  operands = line[opcode.end() : close - 1]
  return Instruction(
    name=head[2],
    type=line[start:end],
    opcode=opcode[1],
    operands=tuple(re.findall(r'%([\w.\-]+)', operands) or operands.split(',')),
    attributes=line[close:],
    is_root=bool(head[1]),
  )


def parse(text: str) -> Program:
  """Returns the program of a text.

  Raises:
    ValueError: the text has no entry, or a line of it is not understood.
  """
  found: dict[str, list[Instruction]] = {}
  entry, name = '', ''
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[2]
      found[name] = []
      entry = name if match[1] else entry
    elif line == '}':
      name = ''
    elif name and (instruction := _instruction(line)):
      found[name].append(instruction)
  if not entry:
    raise ValueError('the text has no ENTRY: give Compiled.as_text()')
  return Program(entry, {name: tuple(found[name]) for name in found})


def _turns(program: Program, loop: Instruction, condition: str) -> int | None:
  """Returns how often a loop turns, None if neither place says it.

  XLA for TPU leaves the number out; then the condition of what `jax.lax.scan`
  and `fori_loop` from 0 made has it: a counter compared with a constant.
  """
  if match := _TRIPS.search(loop.attributes):
    return int(match[1])
  by_name = {i.name: i for i in program.computations[condition]}
  (root,) = (i for i in by_name.values() if i.is_root)
  bound = by_name.get(root.operands[-1])
  if (
    root.opcode == 'compare'
    and 'direction=LT' in root.attributes
    and bound is not None
    and bound.opcode == 'constant'
  ):
    return int(bound.operands[0])
  return None


def called(
  program: Program, instruction: Instruction
) -> Iterator[tuple[str, int | None]]:
  """Yields the computations that an instruction runs, and how often each.

  Of a conditional that is all branches, once each.
  """
  if instruction.opcode == 'while':
    condition, body = _LOOP.search(instruction.attributes).groups()
    turns = _turns(program, instruction, condition)
    yield condition, turns
    yield body, turns
    return
  for name in _CALLED.findall(instruction.attributes):
    yield name, 1
  for names in _BRANCHES.findall(instruction.attributes):
    for name in names.split(','):
      yield name.strip().lstrip('%'), 1


def executed(
  program: Program, *, into_fusions: bool = True
) -> Iterator[tuple[str, Instruction, int | None]]:
  """Yields (computation, instruction, executions) of all that runs.

  A computation that is run from several places comes once for each. Executions
  are None inside of a loop whose number of turns is not known.

  Args:
    program: what `parse` returned.
    into_fusions: False: leaves out what runs inside of a fusion, a reduction
      and the like, whose arrays are in no memory.
  """

  def visit(name, executions):
    for instruction in program.computations[name]:
      yield name, instruction, executions
      if not into_fusions and instruction.opcode not in CONTROL:
        continue
      for inner, times in called(program, instruction):
        known = executions is not None and times is not None
        yield from visit(inner, executions * times if known else None)

  yield from visit(program.entry, 1)
