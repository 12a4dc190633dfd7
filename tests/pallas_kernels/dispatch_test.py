import logging
import re

import pytest

from pallas_kernels import dispatch


def _decline(*args):
  raise NotImplementedError(f'no {args[0]}')


def _op(name='some_op', *, second_unavailable=None):
  return dispatch.Op(
    name,
    (
      dispatch.Implementation(name='first', function=_decline),
      dispatch.Implementation(
        name='second',
        function=lambda x: ('second', x),
        unavailable=lambda: second_unavailable,
      ),
      dispatch.Implementation(name='third', function=lambda x: ('third', x)),
    ),
  )


def test_automatic_choice_takes_the_first_that_covers_the_arguments():
  assert _op()(None, 1) == ('second', 1)
  assert _op(second_unavailable='no GPU')(None, 1) == ('third', 1)


def test_names_are_tried_in_the_order_given():
  assert _op()(('third', 'second'), 1) == ('third', 1)
  assert _op()(('first', 'third'), 1) == ('third', 1)
  assert _op()('second', 1) == ('second', 1)


def test_a_single_name_never_falls_back():
  with pytest.raises(NotImplementedError, match='some_op: not first: no 7'):
    _op()('first', 7)


def test_every_refusal_is_named():
  message = 'some_op: not first: no 7; not second: no GPU'
  with pytest.raises(NotImplementedError, match=re.escape(message)):
    _op(second_unavailable='no GPU')(['first', 'second'], 7)


def test_the_first_that_an_attempt_can_use():
  tried = []

  def attempt(implementation):
    tried.append(implementation.name)
    return implementation.function('it')

  assert _op().first(None, attempt) == ('second', 'it')
  assert tried == ['first', 'second']
  with pytest.raises(NotImplementedError, match='some_op: not first: no it'):
    _op().first('first', attempt)


def test_other_errors_pass_through():
  def fail():
    raise ValueError('wrong argument')

  op = dispatch.Op(
    'op',
    (
      dispatch.Implementation(name='a', function=fail),
      dispatch.Implementation(name='b', function=lambda: 1),
    ),
  )
  with pytest.raises(ValueError, match='wrong argument'):
    op(None)


@pytest.mark.parametrize('choice', ['fast', ['first', 'fast']])
def test_an_unknown_name_is_refused(choice):
  message = "one of first, second, third, got 'fast'"
  with pytest.raises(ValueError, match=message):
    _op()(choice, 1)


def test_an_empty_choice_is_refused():
  with pytest.raises(ValueError, match='some_op is an empty sequence'):
    _op()((), 1)


def test_explain_keeps_order_and_reasons():
  assert _op(second_unavailable='no GPU').explain() == [
    ('first', None),
    ('second', 'no GPU'),
    ('third', None),
  ]


def test_what_runs_is_logged_once_with_the_reasons(caplog):
  op = _op('logged_op', second_unavailable='no GPU')
  with caplog.at_level(logging.INFO, logger='pallas_kernels'):
    op(None, 7)
    op(None, 7)
    op('third', 7)
  assert caplog.messages == [
    'logged_op runs as third (not first: no 7; not second: no GPU)',
    "logged_op runs as third (implementation='third')",
  ]
