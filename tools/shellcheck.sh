#!/usr/bin/env bash
#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

# Checks every shell script of the repository with shellcheck: what has a shell
# in its first line, or says which one to assume ("# shellcheck shell=bash").
#
#   tools/shellcheck.sh [OPTION OF SHELLCHECK...]
set -euo pipefail

cd "$(dirname "$0")/.."
# -I: not the corpus of the fuzz stage.
mapfile -t scripts < <(grep --recursive --files-with-matches -I \
    --exclude-dir={.git,.tox,.venv,build,dist} --exclude='*.py' \
    --extended-regexp '^#!.*[/ ](ba|da|)sh$|^# shellcheck shell=' . | sort)
exec shellcheck "$@" "${scripts[@]}"
