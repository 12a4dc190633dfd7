"""Named configurations: `--config=NAME` of the training programs."""

from collections.abc import Callable

from experiments import config as config_lib
from experiments.configs import laptop
from experiments.configs import paper

TRAIN_LM: dict[str, Callable[[], config_lib.TrainLMConfig]] = {
  'laptop': laptop.laptop,
  'laptop_long': laptop.laptop_long,
  'delta_net_340m': paper.delta_net_340m,
  'delta_net_1b': paper.delta_net_1b,
}
