"""Counts what a compiled program computes and moves, loops by their turns.

`Compiled.cost_analysis` counts the body of a loop once, however often it turns:
the layers of a model, the chunks of a recurrence. Here everything counts as
often as it runs (`hlo_text`), from the text of the program:

* FLOPs are those of matrix products and convolutions, 2 per multiplication and
  addition; of a convolution, positions in the padding do not count.
* Bytes are those of the arrays that an instruction reads and writes in the
  device's main memory, each counted once: of a slice what is sliced, of an
  update what is updated, of a gather what is gathered. What XLA for TPU places
  in a core's own memory does not count.

Kernels (custom calls) move their operands and results; what they compute the
text does not say.
"""

from collections.abc import Mapping
import math
import re

from experiments import hlo_text

_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')
_LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')
_WINDOW = re.compile(r'window=\{([^}]*)\}')
# Layouts name other memories than the main one: S(1) is a TPU core's own.
_OTHER_MEMORY = re.compile(r'S\([1-9]\d*\)')
# Element of a result that is an operand, left where it is: {1}: (0, {}).
_PASSED = re.compile(r'\{(\d+)\}: \((\d+), \{\}')
_MOVES_NOTHING = hlo_text.CONTROL + (
  'after-all',
  'bitcast',
  'constant',
  'get-tuple-element',
  'iota',
  'optimization-barrier',
  'parameter',
  'partition-id',
  'replica-id',
  'tuple',
)

# What of their result is not read, that they do not read either.
_IN_PLACE = ('bitcast', 'convert', 'reshape')

_Named = Mapping[str, hlo_text.Instruction]


def _shape(named: _Named, name: str) -> tuple[int, ...]:
  return hlo_text.arrays(named[name].type)[0].shape


def _dot_flops(instruction, named: _Named) -> int:
  left = _shape(named, instruction.operands[0])
  dims = _CONTRACTED.search(instruction.attributes)[1]
  depth = math.prod(left[int(d)] for d in dims.split(',') if d)
  return 2 * depth * hlo_text.arrays(instruction.type)[0].elements


class _Window:
  """A convolution's window: a field per spatial axis, with its default."""

  def __init__(self, attributes: str, rank: int):
    match = _WINDOW.search(attributes)
    self._text = match[1] if match else ''
    self._rank = rank

  def field(self, name: str, default: str) -> list[str]:
    match = re.search(rf'\b{name}=(\S+)', self._text)
    return match[1].split('x') if match else [default] * self._rank


def _met(size: int, kernel: int, out: int, window: tuple[str, ...]) -> int:
  """Returns the pairs of places of kernel and output that meet an input."""
  stride, padding, of_input, of_kernel = window
  before, dilation = int(padding.split('_')[0]), int(of_input)
  places = (
    o * int(stride) - before + k * int(of_kernel)
    for o in range(out)
    for k in range(kernel)
  )
  span = (size - 1) * dilation + 1
  return sum(0 <= p < span and p % dilation == 0 for p in places)


def _convolution_flops(instruction, named: _Named) -> int:
  """Returns 2 x (pairs that meet) x input channels x outputs of a place.

  XLA for TPU writes batched products so, the batch an axis that is dilated.
  """
  labels = _LABELS.search(instruction.attributes).groups()
  shapes = [_shape(named, name) for name in instruction.operands[:2]]
  shapes.append(hlo_text.arrays(instruction.type)[0].shape)
  inputs, kernel, output = (
    dict(zip(text, shape, strict=True))
    for text, shape in zip(labels, shapes, strict=True)
  )
  axes = sorted(x for x in kernel if x.isdigit())
  window = _Window(instruction.attributes, len(axes))
  fields = zip(
    window.field('stride', '1'),
    window.field('pad', '0_0'),
    window.field('lhs_dilate', '1'),
    window.field('rhs_dilate', '1'),
    strict=True,
  )
  met = math.prod(
    _met(inputs[axis], kernel[axis], output[axis], field)
    for axis, field in zip(axes, fields, strict=True)
  )
  return 2 * met * kernel['i'] * output['b'] * output['f']


def flops(program: hlo_text.Program) -> int:
  """Returns the FLOPs of products and convolutions of a call of the program.

  A loop whose number of turns is not known counts once.
  """
  by_name = {
    name: {i.name: i for i in instructions}
    for name, instructions in program.computations.items()
  }
  count = {'dot': _dot_flops, 'convolution': _convolution_flops}
  total = 0
  for computation, instruction, executions in hlo_text.executed(program):
    if instruction.opcode in count:
      own = count[instruction.opcode](instruction, by_name[computation])
      total += own * (executions or 1)
  return total


def _stored(type_text: str) -> int:
  """Returns the bytes of a type's arrays that lie in the main memory."""
  return sum(
    array.bytes
    for array in hlo_text.arrays(type_text)
    if not _OTHER_MEMORY.search(array.layout)
  )


class _Fusion:
  """What a fusion reads of its operands, and writes."""

  def __init__(self, program: hlo_text.Program, fusion: hlo_text.Instruction):
    ((name, _),) = hlo_text.called(program, fusion)
    instructions = program.computations[name]
    self._program = program
    self._named = {i.name: i for i in instructions}
    self._users: dict[str, list[hlo_text.Instruction]] = {}
    for one in instructions:
      for name in one.operands:
        self._users.setdefault(name, []).append(one)
    (self._root,) = (i for i in instructions if i.is_root)
    self._parameters = {
      int(i.operands[0]): i for i in instructions if i.opcode == 'parameter'
    }

  def _read_of(self, name: str) -> int | None:
    """Returns the bytes that are read of a value, None for the whole of it."""
    total = 0
    for user in self._users.get(name, ()):
      if user.opcode in ('dynamic-slice', 'slice', 'gather'):
        if user.operands[0] != name:
          return None
        total += hlo_text.num_bytes(user.type)
      elif user.opcode == 'fusion':
        inner = self._read_inside(user, name)
        if inner is None:
          return None
        total += inner
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
        continue
      elif user.opcode in _IN_PLACE and not user.is_root:
        inner = self._read_of(user.name)
        if inner is None:
          return None
        # In the type that the value has before.
        before = hlo_text.num_bytes(self._named[name].type)
        total += inner * before // hlo_text.num_bytes(user.type)
      else:
        return None
    return total

  def _read_inside(self, user: hlo_text.Instruction, name: str) -> int | None:
    fusion = _Fusion(self._program, user)
    places = [i for i, operand in enumerate(user.operands) if operand == name]
    reads = [fusion._read_of(fusion._parameters[i].name) for i in places]
    return None if None in reads else sum(reads)

  def read(self, index: int, type_text: str) -> int:
    """Returns the bytes that are read of an operand of that type."""
    stored = _stored(type_text)
    if not stored or index not in self._parameters:
      return stored
    part = self._read_of(self._parameters[index].name)
    return stored if part is None else min(part, stored)

  def written(self, type_text: str) -> int:
    """Returns the bytes that are written of a result of that type."""
    root, types = self._root, hlo_text.elements(type_text)
    is_tuple = root.opcode == 'tuple'
    if len(types) > 1 and not is_tuple:
      return _stored(type_text)
    results = root.operands if is_tuple else (root.name,)
    total = 0
    for name, one in zip(results, types, strict=True):
      source = self._named[name]
      while source.opcode in ('bitcast', 'reshape'):
        source = self._named[source.operands[0]]
      part = _stored(one)
      if part and source.opcode == 'fusion':
        part = _Fusion(self._program, source).written(one)
      elif part and source.opcode == 'dynamic-update-slice':
        part = min(
          part, hlo_text.num_bytes(self._named[source.operands[1]].type)
        )
      total += part
    return total


def _result(instruction) -> str:
  """Returns the type of what an instruction leaves in the end."""
  opcode = instruction.opcode
  if not opcode.endswith('-start') or opcode == 'all-reduce-start':
    return instruction.type
  # (operands, results, ...); of a copy the result comes first.
  parts = hlo_text.elements(instruction.type)
  return parts[0] if opcode == 'copy-start' else parts[1]


def _moved_by_fusion(instruction, types, program: hlo_text.Program) -> int:
  fusion = _Fusion(program, instruction)
  result = _result(instruction)
  passed = [
    (int(x), int(y)) for x, y in _PASSED.findall(instruction.attributes)
  ]
  read = sum(fusion.read(i, t) for i, t in enumerate(types))
  results = hlo_text.elements(result)
  return (
    read
    + fusion.written(result)
    - sum(fusion.read(y, types[y]) + _stored(results[x]) for x, y in passed)
  )


def _moved(instruction, named: _Named, program: hlo_text.Program) -> int:
  """Returns the bytes that an instruction reads and writes, once."""
  opcode = instruction.opcode.removesuffix('-start')
  if opcode in _MOVES_NOTHING or opcode.endswith(('-done', '-update')):
    return 0
  types = [named[n].type for n in instruction.operands if n in named]
  if opcode == 'fusion':
    return _moved_by_fusion(instruction, types, program)
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return _stored(types[0]) and 2 * hlo_text.num_bytes(_result(instruction))
  if opcode == 'dynamic-update-slice':
    return _stored(types[0]) and 2 * hlo_text.num_bytes(types[1])
  if opcode == 'scatter':
    return 2 * _stored(types[-1])
  return sum(map(_stored, types)) + _stored(_result(instruction))


def memory_bytes(program: hlo_text.Program) -> int:
  """Returns the bytes that a call of the program moves; see the module.

  A loop whose number of turns is not known counts once.
  """
  by_name = {
    name: {i.name: i for i in instructions}
    for name, instructions in program.computations.items()
  }
  once: dict[tuple[str, str], int] = {}
  total = 0
  for computation, instruction, executions in hlo_text.executed(
    program, into_fusions=False
  ):
    key = computation, instruction.name
    if key not in once:
      once[key] = _moved(instruction, by_name[computation], program)
    total += once[key] * (executions or 1)
  return total
