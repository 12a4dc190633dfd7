import subprocess

from tests.experiments import tiny_run


def generate(root, cache, *flags, prompt=None):
  process = tiny_run.start(
    [
      *tiny_run.program('generate_text'),
      f'--workdir={root}',
      '--num_tokens=24',
      *flags,
    ],
    cache,
    stdin=subprocess.PIPE,
  )
  if prompt is not None:
    process.stdin.write(prompt)
  return tiny_run.finish(process)


def test_a_prompt_from_a_flag_or_from_standard_input(
  finished_run, compilation_cache
):
  root, prompt = finished_run.root, 'def list\n'
  by_flag = generate(root, compilation_cache, '--greedy', f'--prompt={prompt}')
  assert by_flag.returncode == 0, by_flag.stderr
  assert by_flag.stdout.startswith(prompt)
  assert len(by_flag.stdout) > len(prompt) + 1
  by_input = generate(root, compilation_cache, '--greedy', prompt=prompt)
  assert by_input.stdout == by_flag.stdout


def test_what_cannot_be_done_is_one_line(finished_run, compilation_cache):
  missing = finished_run.root / 'none'
  for root, flag, line in (
    (missing, '--seed=1', f'error: {missing} holds no run'),
    (finished_run.root, '--top_p=2', 'error: top_p must lie in (0, 1], got 2'),
  ):
    result = generate(root, compilation_cache, flag, '--prompt=a')
    assert result.returncode == 1
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
