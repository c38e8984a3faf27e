"""Collectives."""

from xccl._base import CommunicatorBase


class Collectives(CommunicatorBase):
    """Operations in which all ranks of a communicator take part."""
