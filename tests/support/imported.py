"""What a forked rank has imported before it starts, so that a run of seconds does not begin with as many of imports."""

import deepspeed  # noqa: F401
import peft  # noqa: F401
import timm  # noqa: F401

import vitask_plugin.llava.train
from vitask_plugin.llava import compat

compat.prepare()
import llava.train.train  # noqa: E402, F401

import vitask_plugin.hf.train  # noqa: E402
import vitask_plugin.hf.trainer  # noqa: E402
import vitask_plugin.llava.trainer  # noqa: E402, F401
