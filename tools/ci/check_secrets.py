"""Looks for keys, tokens and passwords in the tracked files, or in those that are named. Prints where, never what.

    python tools/ci/check_secrets.py [FILE ...]

A line that only looks like a secret is marked with ``pragma: allowlist secret``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.settings import transient_settings

ROOT = Path(__file__).resolve().parents[2]
DETECTORS = [  # of formats that name themselves; others report digests, and the examples of URLs that are redacted
    "AWSKeyDetector", "ArtifactoryDetector", "AzureStorageKeyDetector", "CloudantDetector", "DiscordBotTokenDetector",
    "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector",
    "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector", "StripeDetector", "TwilioKeyDetector",
]  # fmt: skip


def find(files: list[str]) -> list[str]:
    """Return ``file:line: kind`` of everything that looks like a secret."""
    secrets = SecretsCollection()
    settings = {
        "plugins_used": [{"name": name} for name in DETECTORS],
        "filters_used": [{"path": "detect_secrets.filters.allowlist.is_line_allowlisted"}],
    }
    with transient_settings(settings):
        for file in files:
            secrets.scan_file(file)
    return sorted(f"{file}:{secret.line_number}: {secret.type}" for file, secret in secrets)


def main(arguments: list[str]) -> int:
    files = arguments or subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = find([str(ROOT / file) for file in files])
    for line in found:
        print(line)
    if found:
        print("Fix: remove it and revoke it; or mark a line that only looks like one with `pragma: allowlist secret`.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
