"""The options class of every command, for docs/configuration.md and for tests."""

from common.options import Options
from dvd.config import DescribeOptions, DrainOptions, HealthOptions
from dvd.up_config import UpOptions
from lm_worker.config import LanguageOptions
from server.config import GatewayOptions
from vision_worker.config import VisionOptions

COMMANDS: dict[str, type[Options]] = {
    options.command: options
    for options in (UpOptions, GatewayOptions, VisionOptions, LanguageOptions, DescribeOptions, HealthOptions, DrainOptions)
}
