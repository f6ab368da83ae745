"""scripts/page.py in a headless Chromium: what it draws is what the command draws."""

import shlex
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from browser import browser, open_page
from commands import environment, run, train, wait_for
from conftest import ROOT
from PIL import Image


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def page(place):
    """Served with a LoRA to choose; its address."""
    train(place, "--output_path=out", "--use_lora=True", "--start_learning_rate=1e-2", "--epochs=1")
    address = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [
        sys.executable, str(ROOT / "scripts/page.py"), f"--port={port}", "--ckpt_path=models/base.ckpt",
        "--config=model.yaml", "--lora_ckpt_path=out/dreambooth_lora_epoch_1.safetensors:0.8", "--steps=3",
        "--prompt=a sks dog", "--output_path=painted",
    ]  # fmt: skip
    process = subprocess.Popen(
        arguments, cwd=place, env=environment(place), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: process.poll() is not None or answers(address), seconds=100)
        assert process.poll() is None, process.stderr.read()
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_picture_appears_and_is_that_of_the_command(place, page):
    samples = place / "painted/samples"
    with browser() as opened:
        shown, errors = open_page(opened, page, 1200)
        shown.fill("#prompt textarea", "a (sks:1.2) dog's house")
        shown.click("#draw")
        shown.wait_for_selector("#gallery img", timeout=100_000)
        shown.wait_for_function("document.querySelector('#recipe textarea').value != ''")
        with_lora = shown.input_value("#recipe textarea")  # the first one is chosen, with its weight
        assert "dreambooth_lora_epoch_1.safetensors:0.8" in with_lora
        shown.click("#lora input")
        shown.get_by_role("option", name="none").click()
        shown.click("#draw")
        shown.wait_for_function("!document.querySelector('#recipe textarea').value.includes('lora')")
        plain = shown.input_value("#recipe textarea")
        assert not errors, errors
    for number, command in enumerate((with_lora, plain)):
        words = shlex.split(command)
        assert words[0] == "python" and "--prompt=a (sks:1.2) dog's house" in words
        output = f"--output_path=by_command_{number}"
        run(place, *words[2:], output, "--skip_grid", script=ROOT / "text_to_image.py")
        theirs = np.asarray(Image.open(samples / f"{number:05d}.png"))
        ours = np.asarray(Image.open(place / f"by_command_{number}/samples/00000.png"))
        assert np.array_equal(ours, theirs), number
    assert [path.name for path in sorted(samples.iterdir())] == ["00000.png", "00001.png"]
    both = [np.asarray(Image.open(path)) for path in sorted(samples.iterdir())]
    assert np.abs(both[0].astype(int) - both[1]).max() > 1
