"""All merge methods that need nothing but the models, in one place: what is listed here is registered."""

from mergekit_mediator.methods.doge import Doge
from mergekit_mediator.methods.iso_c import IsoC
from mergekit_mediator.methods.localize_and_stitch import LocalizeAndStitch
from mergekit_mediator.methods.opcm import Opcm
from mergekit_mediator.methods.pcb import Pcb
from mergekit_mediator.methods.r_tsvm import RTsvm
from mergekit_mediator.methods.task_vector_method import TaskVectorMethod
from mergekit_mediator.methods.tsvm import Tsvm
from mergekit_mediator.methods.widen import Widen
from mergekit_mediator.methods.wudi import Wudi

DATA_FREE: tuple[type[TaskVectorMethod], ...] = (
    Doge,
    IsoC,
    LocalizeAndStitch,
    Opcm,
    Pcb,
    RTsvm,
    Tsvm,
    Widen,
    Wudi,
)
