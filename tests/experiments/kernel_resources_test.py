import dataclasses

import pytest

from experiments import kernel_resources

CLEAN = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'wide_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for wide_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
SERIALIZED = (
  'ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async '
  'instructions are serialized due to insufficient register resources for the '
  "wgmma pipeline in the function 'wide_mosaic_gpu_kernel'"
)
SPILLED = (
  'ptxas warning : Registers are spilled to local memory in function '
  "'wide_mosaic_gpu_kernel', 68 bytes spill stores, 72 bytes spill loads"
)
WAIT = (
  'ptxas info    : (C7517) warpgroup.wait is injected in around line 479 by '
  "compiler to allow use of registers defined by GMMA in function 'wide'"
)
CODE = """
  -:-:-:Y:06        /*0110*/                   USETMAXREG.TRY_ALLOC.CTAPOOL 0xe8
  -:-:-:Y:01        /*0710*/                   HGMMA.64x64x16.F32.BF16 R56, ...
  -:-:-:Y:01        /*0720*/                   HGMMA.64x128x16.F32.BF16 R24, ...
"""
LOCAL = """
  -:-:-:Y:01        /*0910*/                   STL [R1+0x28], R5
  2:-:-:Y:04        /*0a90*/                   LDL.64 R2, [R1+0x24]
  -:-:-:Y:04        /*0b00*/                   LDGSTS.E [R3], [R2]
"""
# Passes name the constant after its value, once one has gone through them.
LOG = """
    %out = gpu.launch async [%0] dynamic_shared_memory_size %mpmd_map3A_4 {
      %s = gpu.dynamic_shared_memory : memref<?xi8>
    %out = gpu.launch async [%0] dynamic_shared_memory_size %c181248_i32 {
"""


def _dump(folder, *, report=CLEAN, code=CODE, log=LOG, name='wide', number=3):
  begin = f'{name}_{number}'
  (folder / f'{begin}.ptxas').write_text(report)
  (folder / f'{begin}.sass_ctrl').write_text(code)
  (folder / f'{begin}.ptx').write_text('.entry k()\n.maxntid 384\n{')
  (folder / f'{begin}.mlir-passes.log').write_text(log)
  return folder


def test_a_clean_kernel_is_read(tmp_path):
  # Two of the three warpgroups compute.
  flops = 2 * 2 * (64 * 64 * 16 + 64 * 128 * 16)
  found = kernel_resources.read_kernel(_dump(tmp_path), 'wide')
  assert found == kernel_resources.Resources(
    kernel='wide',
    registers=168,
    spill_bytes=0,
    local_accesses=0,
    shared_bytes=181_248,
    hgmma=2,
    hgmma_flops=flops,
    warnings=(),
    notes=(),
  )
  assert kernel_resources.broken_gates(dataclasses.asdict(found)) == []


def test_all_warpgroups_compute_where_no_registers_are_handed_over(tmp_path):
  code = CODE.replace('USETMAXREG', 'NOP')
  found = kernel_resources.read_kernel(_dump(tmp_path, code=code), 'wide')
  assert found.hgmma_flops == 3 * 2 * (64 * 64 * 16 + 64 * 128 * 16)


def test_a_product_of_one_of_two_kinds_of_warpgroups_is_counted_once(tmp_path):
  take = next(line for line in CODE.splitlines() if 'USETMAXREG' in line)
  found = kernel_resources.read_kernel(
    _dump(tmp_path, code=f'{CODE}{take}\n'), 'wide'
  )
  assert found.hgmma_flops == 2 * (64 * 64 * 16 + 64 * 128 * 16)


def test_spills_local_memory_and_warnings_break_gates(tmp_path):
  spills = '68 bytes spill stores, 72 bytes spill loads'
  report = CLEAN.replace('0 bytes spill stores, 0 bytes spill loads', spills)
  report = '\n'.join([SERIALIZED, SPILLED, WAIT, report])
  _dump(tmp_path, report=report, code=CODE + LOCAL)
  found = kernel_resources.read_kernel(tmp_path, 'wide')
  assert (found.spill_bytes, found.local_accesses) == (140, 2)
  assert found.warnings == (SERIALIZED, SPILLED)
  assert found.notes == (WAIT,)
  broken = kernel_resources.broken_gates(dataclasses.asdict(found))
  assert [line.split(',')[0] for line in broken] == [
    'spill_bytes must be 0',
    'local_accesses must be 0',
    'warnings must be none',
  ]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'shared_bytes': 232_449}, 'shared_bytes must be <= 232448, got 232449'),
    ({'hgmma': 0}, 'hgmma must be above 0, got 0'),
  ],
)
def test_too_much_shared_memory_and_no_products_break_gates(
  tmp_path, changes, message
):
  found = kernel_resources.read_kernel(_dump(tmp_path), 'wide')
  row = dataclasses.asdict(found)
  assert kernel_resources.broken_gates(row | changes) == [message]


def test_names_that_begin_alike_are_told_apart(tmp_path):
  _dump(tmp_path)
  _dump(tmp_path, name='wide_bwd', report=CLEAN.replace('168', '99'))
  assert kernel_resources.kernels(tmp_path) == ['wide', 'wide_bwd']
  registers = [
    kernel_resources.read_kernel(tmp_path, name).registers
    for name in ('wide', 'wide_bwd')
  ]
  assert registers == [168, 99]


def test_a_kernel_compiled_twice_is_refused(tmp_path):
  _dump(tmp_path)
  _dump(tmp_path, number=4)
  with pytest.raises(
    ValueError, match=r'one \.ptxas of the kernel wide, got 2'
  ):
    kernel_resources.read_kernel(tmp_path, 'wide')


def test_a_report_without_registers_is_refused(tmp_path):
  _dump(tmp_path, report=CLEAN.replace('Used', 'Using'))
  with pytest.raises(ValueError, match='must be in the report'):
    kernel_resources.read_kernel(tmp_path, 'wide')


def test_a_launch_without_its_shared_memory_is_refused(tmp_path):
  _dump(tmp_path, log=LOG.replace('%c181248_i32', '%size'))
  with pytest.raises(ValueError, match='dynamic_shared_memory_size.* must be'):
    kernel_resources.read_kernel(tmp_path, 'wide')
