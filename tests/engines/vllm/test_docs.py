"""The vLLM commands of the documents are read by vLLM's own parser."""

import re
import subprocess

import pytest
import vllm_server
from documents import commands, documents

PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
assert parsed.enable_lora
"""


def vllm_commands():
    """The words after `vllm serve` of every such command."""
    found = []
    for words in (words for path in documents() for words in commands(path)):
        while re.match("[A-Z_]+=", words[0]):
            words = words[1:]
        if words[:2] == ["vllm", "serve"]:
            found.append(words[2:])
    return found


@pytest.mark.parametrize("words", vllm_commands(), ids=" ".join)
def test_vllm_takes_the_options(words):
    subprocess.run([vllm_server.PYTHON, "-c", PARSE, *words], check=True)


def test_there_are_such_commands():
    assert vllm_commands()
