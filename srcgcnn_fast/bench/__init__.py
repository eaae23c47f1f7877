"""``srcgcnn-fast bench``: a short measurement of this machine, as a table, a bar chart and a roofline.

Comparisons with other programs are in the repository, under benchmarks/.
"""

from .report import WrongNumbersError as WrongNumbersError
from .report import bench as bench
