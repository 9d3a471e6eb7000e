"""A process that publishes step 10 of the run "tiny" as the holder of its lease, to be killed; see its environment."""

from wmtp_worker.settings import load
from wmtp_worker.storage.cloud import CloudSync, Terms


def main():
    settings = load(preset="smoke")
    with CloudSync(settings.cloud, settings.run.workdir, terms=Terms.of(settings.checkpoint)) as cloud:
        side = cloud.run("tiny")
        cloud.hold(side).began(0)
        side.publish(10)


if __name__ == "__main__":
    main()
