"""Send and receive."""

from xccl._base import CommunicatorBase


class PointToPoint(CommunicatorBase):
    """Send and receive between two ranks."""
