"""Holds the source tree to `source_rules`.

Each rule is run on every module, and on small sources made to break it.
"""

import pathlib

import pytest

from tests import source_rules as rules


@pytest.mark.parametrize('rule', rules.RULES, ids=lambda rule: rule.__name__)
def test_tree_keeps(rule):
  broken = {
    module.path: found
    for module in rules.all_modules()
    if (found := rule(module))
  }
  assert not broken


def test_tests_mirror_the_packages():
  paths = [
    pathlib.PurePosixPath(path.relative_to(rules.ROOT).as_posix())
    for package in rules.PACKAGES
    for path in sorted((rules.ROOT / 'tests' / package).rglob('*_test.py'))
  ]
  assert paths
  assert not [
    str(path) for path in paths if rules.is_misplaced_test(path, rules.ROOT)
  ]


@pytest.mark.parametrize(
  ('path', 'misplaced'),
  [
    ('tests/a/b_test.py', False),
    ('tests/a/c_test.py', True),
    ('tests/b_test.py', True),
    ('tests/a/conformance_test.py', False),
    ('tests/c/conformance_test.py', True),
  ],
)
def test_a_misplaced_test_is_found(tmp_path, path, misplaced):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'b.py').touch()
  assert (
    rules.is_misplaced_test(pathlib.PurePosixPath(path), tmp_path) == misplaced
  )


OP = 'pallas_kernels/delta_rule'
LAYER = 'deltanet_jax/layers/layer.py'
PROGRAM = "app.run(main)\nX = flags.DEFINE_string('x', '', '')\n"

BROKEN = [
  (rules.packages_import_only_what_they_may, f'{OP}/api.py', 'import flax'),
  (
    rules.packages_import_only_what_they_may,
    f'{OP}/api.py',
    'import deltanet_jax',
  ),
  (rules.packages_import_only_what_they_may, f'{OP}/step.py', 'import triton'),
  (rules.packages_import_only_what_they_may, LAYER, 'import optax'),
  (rules.packages_import_only_what_they_may, LAYER, 'from absl import flags'),
  (rules.packages_import_only_what_they_may, LAYER, 'def f():\n  import grain'),
  (
    rules.packages_import_only_what_they_may,
    LAYER,
    'import experiments.config',
  ),
  (
    rules.packages_import_only_what_they_may,
    'experiments/a.py',
    'import tests.x',
  ),
  (
    rules.modules_use_public_names_of_kernels,
    LAYER,
    'from pallas_kernels import dispatch',
  ),
  (
    rules.modules_use_public_names_of_kernels,
    LAYER,
    'from pallas_kernels.delta_rule import api',
  ),
  (rules.imports_are_absolute_and_by_name, LAYER, 'from . import norm'),
  (rules.imports_are_absolute_and_by_name, LAYER, 'from ..config import x'),
  (rules.imports_are_absolute_and_by_name, LAYER, 'from jax.numpy import *'),
  (
    rules.imports_are_of_modules,
    'experiments/a.py',
    'from experiments.doctor import main',
  ),
  (
    rules.programs_are_imported_by_none,
    'experiments/a.py',
    'from experiments import doctor',
  ),
  (rules.programs_are_thin, 'experiments/a.py', PROGRAM + '\n' * 59),
  (
    rules.backends_know_no_other,
    f'{OP}/mosaic_gpu.py',
    'from pallas_kernels.delta_rule import reference',
  ),
  (
    rules.backends_know_no_other,
    f'{OP}/triton_gpu_kernels.py',
    'import pallas_kernels.delta_rule.mosaic_gpu_inverse',
  ),
  (
    rules.references_import_jax_alone,
    f'{OP}/reference.py',
    'import numpy as np',
  ),
  (
    rules.references_import_jax_alone,
    f'{OP}/reference.py',
    'from pallas_kernels import shapes',
  ),
  (rules.files_are_short, LAYER, '\n' * 401),
  (rules.files_are_short, f'{OP}/mosaic_gpu.py', '\n' * 601),
  (rules.functions_are_short, LAYER, 'def f():\n' + '  x = 1\n' * 81),
  (
    rules.functions_are_short,
    f'{OP}/mosaic_gpu.py',
    'def f():\n' + '  x\n' * 151,
  ),
  (rules.public_names_have_docstrings, LAYER, 'x = 1'),
  (rules.public_names_have_docstrings, LAYER, '"""M."""\ndef f():\n  pass'),
  (rules.public_names_have_docstrings, LAYER, '"""M."""\nclass C:\n  pass'),
  (rules.flags_are_read_in_main, 'experiments/a.py', 'x = FLAGS.steps'),
  (rules.flags_are_read_in_main, 'experiments/a.py', 'x = flags.FLAGS.steps'),
  (
    rules.flags_are_read_in_main,
    'experiments/a.py',
    PROGRAM + 'def f():\n  return X.value',
  ),
]


@pytest.mark.parametrize(('rule', 'path', 'source'), BROKEN)
def test_a_broken_rule_is_found(rule, path, source):
  assert rule(rules.Module(path, source))


KEPT = [
  (f'{OP}/triton_gpu.py', '"""M."""\nimport jax_triton'),
  (f'{OP}/mosaic_gpu.py', '"""M."""\n' + 'x = 1\n' * 599),
  (f'{OP}/mosaic_gpu.py', '"""M."""\nfrom pallas_kernels import dispatch\n'),
  (f'{OP}/reference.py', '"""M."""\nimport functools\nimport jax.numpy'),
  (LAYER, '"""M."""\nfrom pallas_kernels import delta_rule\nimport flax'),
  (LAYER, '"""M."""\ndef _f():\n' + '  x = 1\n' * 80),
  (
    'experiments/a.py',
    '"""M."""\n' + PROGRAM + 'def main(argv):\n  """D."""\n  print(X.value)',
  ),
  ('experiments/a.py', '"""M."""\ndef _f(values=flags.FLAGS):\n  pass'),
  ('experiments/__init__.py', ''),
]


@pytest.mark.parametrize(('path', 'source'), KEPT)
def test_what_is_allowed_breaks_no_rule(path, source):
  assert not [rule for rule in rules.RULES if rule(rules.Module(path, source))]
