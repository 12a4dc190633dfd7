"""Reads the launch files as their programs would, without a cluster."""

import pathlib
import re
import subprocess

from absl import flags
import pytest
import yaml

from experiments import config as config_lib
from experiments import config_flags
from experiments import configs
from tests.experiments import tiny_run

LAUNCH = tiny_run.ROOT / 'experiments' / 'launch'
FILES = sorted(LAUNCH.iterdir())
# Of the schedulers' own commands, in the same files.
OTHER_FLAGS = {'kill-on-bad-exit', 'zone', 'worker', 'command'}


@pytest.fixture(scope='module')
def jobset():
  return yaml.safe_load((LAUNCH / 'jobset_gpu.yaml').read_text())


def container(jobset):
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  return job['template']['spec']['containers'][0]


def check_bash(script: str):
  result = subprocess.run(
    ['bash', '-n'], input=script, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


def test_there_is_one_for_each_kind_of_cluster():
  assert [path.name for path in FILES] == [
    'jobset_gpu.yaml',
    'slurm_gpu.sh',
    'tpu_slice.sh',
  ]


def test_scripts_are_bash(jobset):
  for path in LAUNCH.glob('*.sh'):
    check_bash(path.read_text())
  check_bash(container(jobset)['args'][0])


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_the_flags_of_the_training_program_exist(path: pathlib.Path):
  known = flags.FlagValues()
  flags.DEFINE_string('workdir', None, '', flag_values=known)
  flags.DEFINE_string('config', None, '', flag_values=known)
  for config_class in (config_lib.TrainLMConfig, config_lib.RuntimeConfig):
    config_flags.define_flags(config_class, flag_values=known)
  _, _, command = path.read_text().partition('-m experiments.train_lm')
  used = set(re.findall(r'--([\w.-]+)=', command)) - OTHER_FLAGS
  assert {'config', 'workdir', 'watchdog_seconds'} <= used
  assert not {name for name in used if name not in known}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_the_named_configuration_exists(path: pathlib.Path):
  text = path.read_text()
  names = re.findall(r'CONFIG:-(\w+)|--config=(\w+)', text)
  assert names
  assert {one or other for one, other in names} <= configs.TRAIN_LM.keys()


def test_the_jobset_counts_its_processes_alike(jobset):
  replicated = jobset['spec']['replicatedJobs'][0]
  job = replicated['template']['spec']
  script = container(jobset)['args'][0]
  assert job['completionMode'] == 'Indexed'
  count = int(re.search(r'--num_processes=(\d+)', script)[1])
  assert job['parallelism'] == job['completions'] == count
  name = jobset['metadata']['name']
  assert f'={name}-{replicated["name"]}-0-0.{name}:' in script
  defined = {variable['name'] for variable in container(jobset)['env']}
  assert {'PROCESS_ID', 'WORKDIR'} <= defined


_FAKE_PYTHON = """#!/usr/bin/env bash
trap 'touch "$MARK"; kill %1; exit 0' TERM
echo started
[[ -z "$WAIT" ]] && exit "$STATUS"
sleep 20 >/dev/null & wait
"""


@pytest.mark.parametrize(
  ('status', 'is_finished', 'expected'),
  [(0, True, 0), (0, False, 75), (1, False, 1), (75, False, 75)],
)
def test_a_pod_succeeds_only_when_the_run_is_finished(
  jobset, tmp_path, status, is_finished, expected
):
  if is_finished:
    (tmp_path / 'report.json').touch()
  process = start_pod(jobset, tmp_path, STATUS=str(status))
  process.communicate(timeout=10)
  assert process.returncode == expected


def test_a_pod_hands_sigterm_on_and_asks_to_be_restarted(jobset, tmp_path):
  process = start_pod(jobset, tmp_path, WAIT='1')
  process.terminate()
  process.communicate(timeout=10)
  assert process.returncode == 75
  assert (tmp_path / 'mark').exists()


def start_pod(jobset, directory, **variables) -> subprocess.Popen:
  """Starts the container's script with a stand-in for Python."""
  fake = directory / 'python'
  fake.write_text(_FAKE_PYTHON)
  fake.chmod(0o755)
  environment = {
    'PATH': f'{directory}:/usr/bin:/bin',
    'WORKDIR': str(directory),
    'PROCESS_ID': '0',
    'MARK': str(directory / 'mark'),
    'WAIT': '',
    'STATUS': '',
  }
  process = subprocess.Popen(
    ['bash', '-c', container(jobset)['args'][0]],
    env=environment | variables,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'started\n'
  return process
