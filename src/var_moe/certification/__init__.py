"""Certificates: statements about a configuration with an error rate that a sceptic can check."""

from var_moe.certification.certify import NotCertifiedError
from var_moe.certification.plan import CertifySettings

__all__ = ["CertifySettings", "NotCertifiedError"]
