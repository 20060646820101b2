"""The report: what an artifact stores and how accurate it is, as one HTML page that loads nothing.

`facts` gathers the numbers, `sections` and `figures` say what is shown of them and `page` draws it; these are pure.
`stored` does it for an artifact's folder, `plots` writes its figures as files.
"""

from kvcc.report.facts import report_facts
from kvcc.report.page import report_html
from kvcc.report.stored import Extras, render_report, report_figures, stored_facts

__all__ = ["Extras", "render_report", "report_facts", "report_figures", "report_html", "stored_facts"]
