import types

from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu_triangular as triangular
from pallas_kernels import mosaic_gpu_utils as utils
from tests import mosaic_gpu_interpreter

_SIZE = triangular.SIZE
_LANES = np.arange(32)


def _blocks(kind, count=4):
  """Returns strictly lower triangular blocks, float64 [count, 16, 16]."""
  rng = np.random.default_rng(0)
  values = {
    'random': rng.normal(size=(count, _SIZE, _SIZE)),
    'parallel': np.full((count, _SIZE, _SIZE), 1.98),
  }[kind]
  return np.tril(values, -1).astype(np.float32).astype(np.float64)


def _expected(blocks):
  return np.linalg.inv(np.eye(_SIZE) + blocks)


def _error(actual, expected):
  return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize('kind', ['random', 'parallel'])
def test_inverts_each_block_where_a_kernel_is_interpreted(kind):
  blocks = _blocks(kind)

  def kernel(a_ref, x_ref):
    a = plgpu.load(a_ref, layout=utils.LAYOUT, optimized=False)
    x_ref[...] = triangular.inverse(a, interpreted=True)

  tall = jnp.asarray(blocks.reshape(-1, _SIZE), jnp.float32)
  found = plgpu.kernel(
    kernel, out_type=tall, interpret=mosaic_gpu_interpreter.parameters()
  )(tall)
  found = np.float64(found).reshape(blocks.shape)
  assert _error(found, _expected(blocks)) < 1e-6


class _Fragment:
  """A warp's part of an array: by register two numbers of each thread."""

  def __init__(self, registers):
    self.registers = registers

  def copy(self):
    return _Fragment(self.registers.copy())


def _fragment(block):
  """Returns a block [16, 16] as a warp has it, see PTX on accumulators."""
  registers = np.empty(4, dtype=object)
  for number in range(4):
    columns, half = divmod(number, 2)
    row = _LANES // 4 + 8 * half
    column = 8 * columns + 2 * (_LANES % 4)
    registers[number] = np.stack([block[row, column], block[row, column + 1]])
  return _Fragment(registers)


def _block(fragment):
  """Undoes `_fragment`."""
  block = np.zeros((_SIZE, _SIZE))
  for number, register in enumerate(fragment.registers):
    columns, half = divmod(number, 2)
    row = _LANES // 4 + 8 * half
    column = 8 * columns + 2 * (_LANES % 4)
    block[row, column], block[row, column + 1] = register
  return block


def _replace_instructions(monkeypatch):
  """Has instructions computed of the numbers of all threads of a warp."""
  fakes = {
    'arith': {
      'remui': np.remainder,
      'andi': np.bitwise_and,
      'subi': np.subtract,
      'addi': np.add,
      'negf': np.negative,
    },
    'math': {'fma': lambda a, b, c: a * b + c},
    'nvvm': {
      'shfl_sync': lambda mask, x, thread, last, kind: x[thread],
      'ShflKind': types.SimpleNamespace(idx=None),
    },
    'vector': {
      'extract': lambda x, dynamic_position, static_position: x[
        static_position[0]
      ],
      'from_elements': lambda _, numbers: np.stack(numbers),
    },
    'ir': {
      'DenseI64ArrayAttr': types.SimpleNamespace(get=lambda x: x),
      'VectorType': types.SimpleNamespace(get=lambda *_: None),
      'F32Type': types.SimpleNamespace(get=lambda: None),
    },
  }
  for name, functions in fakes.items():
    fake = types.SimpleNamespace(**functions)
    monkeypatch.setattr(triangular, name, fake)
  monkeypatch.setattr(triangular, '_constant', lambda x: x)
  thread = types.SimpleNamespace(thread_idx=lambda: _LANES + 64)
  fake = types.SimpleNamespace(utils=thread)
  monkeypatch.setattr(triangular, 'mgpu', fake)


@pytest.mark.parametrize('kind', ['random', 'parallel'])
def test_threads_hand_each_other_rows_and_columns(monkeypatch, kind):
  _replace_instructions(monkeypatch)
  (block,) = _blocks(kind, count=1)
  found = triangular.eliminate(None, _fragment(block), _fragment(np.eye(_SIZE)))
  assert _error(_block(found), _expected(block)) < 1e-12
