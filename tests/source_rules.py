"""The rules of the source tree; WORKSPACE.md gives the reasons.

Each is a function from one module to the list of what breaks the rule there.
"""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('pallas_kernels', 'deltanet_jax', 'experiments')

# What a package may import besides the standard library and itself; None: all
# but the tests.
ALLOWED_IMPORTS = {
  'pallas_kernels': {'jax', 'numpy'},
  'deltanet_jax': {'jax', 'numpy', 'flax', 'pallas_kernels'},
  'experiments': None,
}
TRITON = {'jax_triton', 'triton'}
BACKENDS = (
  'reference',
  'chunked_xla',
  'mosaic_gpu',
  'triton_gpu',
  'mosaic_tpu',
)
# Test files that are named after what they prove, not after one module.
SUITES = ('conformance_test.py', 'drill_test.py')


@dataclasses.dataclass(frozen=True)
class Module:
  """A source file; `path` is relative to the root, with slashes."""

  path: str
  source: str

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.source)

  @property
  def package(self) -> str:
    return self.path.split('/')[0]

  @property
  def stem(self) -> str:
    return pathlib.PurePosixPath(self.path).stem

  @property
  def name(self) -> str:
    return (
      self.path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    )

  @property
  def num_lines(self) -> int:
    return len(self.source.splitlines())

  @functools.cached_property
  def is_program(self) -> bool:
    return any(
      isinstance(node, ast.Call) and ast.unparse(node.func) == 'app.run'
      for node in ast.walk(self.tree)
    )

  @property
  def is_kernel(self) -> bool:
    return (
      self.stem.startswith(('mosaic_', 'triton_')) or 'kernels' in self.stem
    )

  @functools.cached_property
  def imports(self) -> list[str]:
    """Dotted names: 'a.b' of `import a.b`, 'a.b.c' of `from a.b import c`."""
    names = []
    for node in ast.walk(self.tree):
      if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names += [f'{node.module or ""}.{alias.name}' for alias in node.names]
    return names


@functools.cache
def all_modules() -> tuple[Module, ...]:
  return tuple(
    Module(path.relative_to(ROOT).as_posix(), path.read_text())
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob('*.py'))
  )


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node


def packages_import_only_what_they_may(module: Module) -> list[str]:
  allowed = ALLOWED_IMPORTS[module.package]
  tops = {name.split('.')[0] for name in module.imports} - {module.package}
  if allowed is None:
    return sorted(tops & {'tests'})
  if module.stem.startswith('triton_gpu'):
    allowed = allowed | TRITON
  return sorted(tops - allowed - sys.stdlib_module_names)


def _is_public(name: str) -> bool:
  parts = name.split('.')
  return parts == ['pallas_kernels'] or (
    len(parts) == 2 and parts[1] in _public_names()
  )


@functools.cache
def _public_names() -> frozenset[str]:
  tree = ast.parse((ROOT / 'pallas_kernels' / '__init__.py').read_text())
  (names,) = [
    ast.literal_eval(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign)
    and ast.unparse(node.targets[0]) == '__all__'
  ]
  return frozenset(names)


def modules_use_public_names_of_kernels(module: Module) -> list[str]:
  if module.package != 'deltanet_jax':
    return []
  names = [n for n in module.imports if n.split('.')[0] == 'pallas_kernels']
  return [name for name in names if not _is_public(name)]


def imports_are_absolute_and_by_name(module: Module) -> list[str]:
  return [
    ast.unparse(node)
    for node in ast.walk(module.tree)
    if isinstance(node, ast.ImportFrom)
    and (node.level > 0 or node.names[0].name == '*')
  ]


def imports_are_of_modules(module: Module) -> list[str]:
  """`from experiments.data import token_store`, never its functions."""
  if module.stem == '__init__':
    return []
  known = {other.name for other in all_modules()}
  return [
    name
    for name in module.imports
    if name.split('.')[0] == module.package and name not in known
  ]


def programs_are_imported_by_none(module: Module) -> list[str]:
  programs = {other.name for other in all_modules() if other.is_program}
  return [
    name
    for name in module.imports
    if name in programs or name.rpartition('.')[0] in programs
  ]


def programs_are_thin(module: Module) -> list[str]:
  if module.is_program and module.num_lines > 60:
    return [f'{module.num_lines} lines, 60 are the most of a program']
  return []


def _backend(name: str) -> str | None:
  stem = name.split('.')[-1]
  return next((b for b in BACKENDS if stem.startswith(b)), None)


def backends_know_no_other(module: Module) -> list[str]:
  own = _backend(module.stem)
  if module.package != 'pallas_kernels' or own is None:
    return []
  return [
    name
    for name in module.imports
    if name.startswith('pallas_kernels.') and _backend(name) not in (own, None)
  ]


def references_import_jax_alone(module: Module) -> list[str]:
  if module.package != 'pallas_kernels' or module.stem != 'reference':
    return []
  tops = {name.split('.')[0] for name in module.imports}
  return sorted(tops - {'jax'} - sys.stdlib_module_names)


def files_are_short(module: Module) -> list[str]:
  most = 600 if module.is_kernel else 400
  if module.num_lines > most:
    return [f'{module.num_lines} lines, {most} are the most']
  return []


def functions_are_short(module: Module) -> list[str]:
  most = 150 if module.is_kernel else 80
  return [
    f'{function.name}: {_body_lines(function)} lines, {most} are the most'
    for function in _functions(module.tree)
    if _body_lines(function) > most
  ]


def _body_lines(function: ast.FunctionDef) -> int:
  """Counts the lines after signature and docstring."""
  first = function.body[0]
  start = first.lineno
  if ast.get_docstring(function) is not None:
    start = first.end_lineno + 1
  return max(0, function.end_lineno - start + 1)


def public_names_have_docstrings(module: Module) -> list[str]:
  if not module.source.strip():
    return []
  public = [
    node
    for node in module.tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
    and not node.name.startswith('_')
  ]
  missing = [node.name for node in public if not ast.get_docstring(node)]
  return missing if ast.get_docstring(module.tree) else ['module', *missing]


def flags_are_read_in_main(module: Module) -> list[str]:
  """Neither FLAGS.name nor the value of a flag holder is read elsewhere."""
  holders = {
    target.id
    for node in module.tree.body
    if isinstance(node, ast.Assign) and 'DEFINE_' in ast.unparse(node.value)
    for target in node.targets
    if isinstance(target, ast.Name)
  }
  in_main = {
    node
    for statement in module.tree.body
    if isinstance(statement, ast.FunctionDef) and statement.name == 'main'
    for node in ast.walk(statement)
  }
  return [
    f'line {node.lineno}: {ast.unparse(node)}'
    for node in ast.walk(module.tree)
    if isinstance(node, ast.Attribute)
    and node not in in_main
    and (
      re.fullmatch(r'(flags\.)?_?FLAGS', ast.unparse(node.value))
      or (node.attr == 'value' and ast.unparse(node.value) in holders)
    )
  ]


RULES = (
  packages_import_only_what_they_may,
  modules_use_public_names_of_kernels,
  imports_are_absolute_and_by_name,
  imports_are_of_modules,
  programs_are_imported_by_none,
  programs_are_thin,
  backends_know_no_other,
  references_import_jax_alone,
  files_are_short,
  functions_are_short,
  public_names_have_docstrings,
  flags_are_read_in_main,
)


def is_misplaced_test(path: pathlib.PurePosixPath, root: pathlib.Path) -> bool:
  """Whether tests/<package>/<...>/<module>_test.py mirrors no module."""
  parent = root / path.parent.relative_to('tests')
  if path.name.endswith(SUITES):
    return not parent.is_dir()
  module = path.name.removesuffix('_test.py')
  return not ((parent / f'{module}.py').exists() or (parent / module).is_dir())
