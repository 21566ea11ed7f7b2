"""Forecasts of time, memory and disk, before runs begin."""
