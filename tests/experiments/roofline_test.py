import pytest

from experiments import chips
from experiments import collectives
from experiments import roofline

H200, V5P = chips.target('h200').chip, chips.target('v5p:1').chip
MESH = {'dcn_data': 1, 'data': 2, 'fsdp': 8, 'sequence': 2, 'tensor': 2}


@pytest.mark.parametrize(
  ('axes', 'members'),
  [
    (('tensor',), 2),
    (('sequence',), 2),
    (('sequence', 'tensor'), 4),
    (('fsdp',), 2),  # Strides of 4: two in a host of 8.
    (('data',), 1),
    (('fsdp', 'sequence', 'tensor'), 8),
  ],
)
def test_members_of_a_group_in_a_host(axes, members):
  assert roofline.members_per_host(MESH, axes) == members


@pytest.mark.parametrize(
  ('chip', 'axes', 'members', 'size', 'expected'),
  [
    (H200, ('fsdp',), 8, 8, H200.link_bandwidth),
    (H200, ('data',), 1, 8, H200.network_bandwidth),
    (H200, ('data',), 2, 16, 2 * H200.network_bandwidth),
    (V5P, ('fsdp',), 1, 64, V5P.link_bandwidth),
    (V5P, ('dcn_data', 'fsdp'), 1, 64, V5P.network_bandwidth),
  ],
)
def test_bandwidth(chip, axes, members, size, expected):
  assert roofline.bandwidth(chip, axes, members, size) == expected


def _sent(seconds, axes):
  size = round(seconds * V5P.link_bandwidth * 2 / 3)  # Of 4: 2 x 3 / 4.
  return collectives.Collective(
    kind='all-reduce', axes=axes, group_size=4, bytes=size, executions=1
  )


@pytest.mark.parametrize(
  ('flops', 'moved', 'bound_by', 'longest'),
  [(7, 1, 'compute', 7), (1, 6, 'memory', 6), (1, 1, 'network', 5)],
)
def test_the_longest_clock_bounds_the_step(flops, moved, bound_by, longest):
  work = roofline.Work(
    flops=flops * V5P.peak_flops,
    memory_bytes=moved * V5P.memory_bandwidth,
    collectives=(_sent(2, ('fsdp',)), _sent(3, ('sequence',))),
  )
  found = roofline.estimate(work, V5P, MESH, 0.5 * V5P.peak_flops)
  assert found['is_estimate']
  assert found['bound_by'] == bound_by
  assert found['step_seconds'] == pytest.approx(longest)
  assert found['network_seconds'] == pytest.approx({'fsdp': 2, 'sequence': 3})
  total = flops + moved + 5
  assert found['step_seconds_nothing_hidden'] == pytest.approx(total)
  assert found['mfu'] == pytest.approx(0.5 / longest)
  assert found['mfu_nothing_hidden'] == pytest.approx(0.5 / total)
