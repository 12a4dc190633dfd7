import jax
import pytest

from experiments import doctor
from pallas_kernels import dispatch


def _op(**reasons):
  return dispatch.Op(
    'some_op',
    tuple(
      dispatch.Implementation(
        name=name, function=lambda: None, unavailable=lambda r=reason: r
      )
      for name, reason in reasons.items()
    ),
  )


def test_report_names_versions_devices_and_every_implementation():
  lines = list(doctor.report())
  assert f'  {"jax":<18}{jax.__version__}' in lines
  assert f'  {len(jax.devices())} x {jax.devices()[0].device_kind}' in lines
  for op in doctor.OPS:
    start = lines.index(op.name)
    for offset, (name, _) in enumerate(op.explain(), start=1):
      assert lines[start + offset].startswith(f'  {name} ')


def test_the_first_that_can_run_is_the_default(monkeypatch):
  op = _op(gpu='there is no GPU', scan=None, loop=None)
  monkeypatch.setattr(doctor, 'OPS', (op,))
  lines = list(doctor.report())
  assert [line.split(maxsplit=1) for line in lines[-3:]] == [
    ['gpu', 'cannot run: there is no GPU'],
    ['scan', 'runs by default'],
    ['loop', 'can run'],
  ]


def test_arguments_are_refused():
  with pytest.raises(Exception, match='no arguments') as error:
    doctor.main(['doctor', 'extra'])
  assert type(error.value).__name__ == 'UsageError'
