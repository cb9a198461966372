from tests.tracking.wandb_server import server as server
