from experiments import benchmark_tables


def _length_row(length, milliseconds, temp_bytes, variant='plain'):
  result = {'min_ms': milliseconds, 'temp_bytes': temp_bytes}
  return {
    'op': 'delta_rule',
    'variant': variant,
    'shape': {'T': length},
    'results': {'xla': result},
  }


def test_growth_is_over_three_octaves_of_one_variant():
  rows = [
    _length_row(1024, 10, 100),
    _length_row(2048, 20, 150),
    _length_row(8192, 85, 700),
    _length_row(16384, 180, 1200),
    _length_row(8192, 1, 1, variant='g per head'),
  ]
  found = list(benchmark_tables.growth(rows))
  assert [(g['T'], g['time'], g['memory']) for g in found] == [
    (1024, 8.5, 7),
    (2048, 9, 8),
  ]
  within, above = map(benchmark_tables.format_growth, found)
  assert within == (
    'delta_rule plain, T = 1024: time(8T)/time(T) 8.50, memory 7.00, within 8.8'
  )
  assert above.endswith('9.00, memory 8.00, ABOVE 8.8')


CHECK = {
  'kind': 'kernel_check',
  'implementation': 'mosaic_gpu',
  'variant': 'plain',
  'shape': {'name': 'small'},
  'cosine': 0.9,
  'with_segments': True,
  'errors': {'o': 1e-3, 'dbeta': 2e-3},
  'broken': [],
}
TIME = {
  'median_ms': 1.0,
  'min_ms': 0.9,
  'flops_per_s': 5e14,
  'peak_share': 0.5,
  'bytes_per_s': 2e12,
}


def test_a_check_is_a_line():
  assert list(benchmark_tables.format_row(CHECK)) == [
    'mosaic_gpu small plain, cosine 0.9, segments: greatest error 2.0e-03 '
    '(dbeta); right, the same in two runs'
  ]


def test_the_speed_up_stands_beside_the_hopper_kernels_where_they_ran():
  row = {
    'kind': 'kernel',
    'op': 'delta_rule',
    'variant': 'plain',
    'shape': {'name': 'b1'},
    'pass': 'forward',
    'speed_up': 3.25,
    'fla_ratio': 2.5,
    'published_ms': 0.283,
    'compared': ['xla', 'mosaic_gpu'],
    'results': {
      'mosaic_gpu': TIME | {'temp_bytes': 2**21},
      'xla': TIME | {'temp_bytes': 2**20},
      'fla': TIME,
    },
  }
  lines = [line.split() for line in benchmark_tables.format_row(row)]
  assert [line[4] for line in lines] == ['mosaic_gpu', 'xla', 'fla']
  assert lines[0][5:] == (
    '1.000 0.900 2.0 500000.0 2000.0 50.0% 3.2 2.50 0.283'.split()
  )
  assert lines[1][-1] == lines[2][-1] == '50.0%'
