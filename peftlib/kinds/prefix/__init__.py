"""Prefix tuning: the adapter type, and the ways in which an attention is met inside a module."""

from .prefix import Prefix as Prefix
