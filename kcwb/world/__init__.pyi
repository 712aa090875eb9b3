from .facts import STEPS as STEPS, make_world as make_world
from .models import (
    Recipe as Recipe,
    load_world as load_world,
    read_training as read_training,
    train_world as train_world,
    world_knowledge as world_knowledge,
)
