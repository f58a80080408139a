"""Mixture of experts: routing, balance, and the exchange between devices."""
