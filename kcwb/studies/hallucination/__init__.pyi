from .measurement import KINDS as KINDS, measure_answers as measure_answers
from .prediction import hallucination_study as hallucination_study, predict_wrong as predict_wrong
