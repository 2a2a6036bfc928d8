"""Types that users meet and do not construct, for annotations: what plans, step records, reports and `info()` are.

Example:
    >>> from fam_ext.typing import StepRecord
    >>> def log(record: StepRecord) -> None:
    ...     print(record.as_dict())
"""

from __future__ import annotations

from fam_ext.loss.plan import Plan, Plans
from fam_ext.loss.step_record import StepRecord
from fam_ext.measurement import Report
from fam_ext.ops.backends import Info
from fam_ext.schedules import Schedule

__all__ = ["Info", "Plan", "Plans", "Report", "Schedule", "StepRecord"]
