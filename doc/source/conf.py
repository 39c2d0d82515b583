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

"""Sphinx settings of the documentation."""

extensions = [
    'openstackdocstheme',
    'oslo_config.sphinxext',
    'sphinx_feature_classification.support_matrix',
]

project = 'nova-lxd-py'
copyright = 'nova-lxd-py contributors'  # noqa: A001
master_doc = 'index'
exclude_patterns: list[str] = []

html_theme = 'openstackdocs'
pygments_style = 'native'
openstackdocs_auto_name = False
openstackdocs_repo_name = ''
openstackdocs_use_storyboard = False
html_theme_options = {'show_other_versions': False}
