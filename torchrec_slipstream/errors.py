"""What can be wrong with what a user gave us. Every message names the value and the remedy."""

from __future__ import annotations


class SlipstreamError(ValueError):
    """Base of all errors raised on purpose by this package."""


class ConfigError(SlipstreamError):
    """A configuration value is out of its range."""


class AttachError(SlipstreamError):
    """The model cannot be attached to (or is attached already); nothing was changed."""


class StateError(SlipstreamError):
    """A saved state does not belong to this model or this configuration; nothing was loaded."""


class LookupRangeError(SlipstreamError):
    """A look-up names a row that its table does not have; nothing was updated."""


class ProfileError(SlipstreamError):
    """An access profile, or what it is measured from, is not what it should be; nothing was changed."""


class PlanError(SlipstreamError):
    """There is no plan, or none that fits the memory; the message says by how much, and what would."""


class InputError(SlipstreamError):
    """A batch, or the loader that gives them, is not what it should be."""
