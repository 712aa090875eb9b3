from .figure import (
    INK as INK,
    MUTED as MUTED,
    Plot as Plot,
    finish as finish,
    panes as panes,
    picture as picture,
    plain as plain,
)
from .charts import (
    draw_curves as draw_curves,
    plot_attention as plot_attention,
    plot_bars as plot_bars,
    plot_completeness as plot_completeness,
    plot_faithfulness as plot_faithfulness,
    plot_frontier as plot_frontier,
    plot_heads as plot_heads,
    plot_knowledge as plot_knowledge,
    plot_lens as plot_lens,
)
from .attending import plot_attending as plot_attending
from .sureness import plot_confidence as plot_confidence, plot_inclusion as plot_inclusion, plot_sources as plot_sources
from .referee import (
    matrix_sentence as matrix_sentence,
    minimality_sentence as minimality_sentence,
    plot_matrix as plot_matrix,
    plot_minimality as plot_minimality,
    plot_rivals as plot_rivals,
    rivals_sentence as rivals_sentence,
)
