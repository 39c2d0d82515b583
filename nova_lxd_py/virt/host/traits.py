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

"""Placement traits of the host.

The driver reports the traits below, and removes them when they no longer
apply. Other traits of the host, such as those of an operator or of another
agent, are not changed.

=============================  ============================================
trait                          the host has it if
=============================  ============================================
HW_ARCH_*                      it can run images of that architecture
HW_CPU_*                       its CPUs have that feature
CUSTOM_LXD_SERVER_LXD, _INCUS  it runs LXD, or Incus
CUSTOM_LXD_POOL_<driver>       the storage pool has that driver
CUSTOM_LXD_KERNEL_<feature>    LXD reports that kernel feature
CUSTOM_LXD_ISOLATED_IDMAP      instances can have their own uid ranges
CUSTOM_LXD_NESTING             flavors may allow nesting
CUSTOM_LXD_PRIVILEGED          flavors may allow privileged instances
CUSTOM_LXD_GPU_<ids>, _USB_    it has that device, and the operator allows
                               flavors to pass it through
=============================  ============================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import re
from typing import Any

import os_traits

HYPERTHREADING = 'HW_CPU_HYPERTHREADING'
ISOLATED_IDMAP = 'CUSTOM_LXD_ISOLATED_IDMAP'
NESTING = 'CUSTOM_LXD_NESTING'
PRIVILEGED = 'CUSTOM_LXD_PRIVILEGED'

_SERVER = 'CUSTOM_LXD_SERVER_'
_POOL = 'CUSTOM_LXD_POOL_'
_KERNEL = 'CUSTOM_LXD_KERNEL_'
_DEVICES = {'gpu': 'CUSTOM_LXD_GPU_', 'usb': 'CUSTOM_LXD_USB_'}

_STANDARD = frozenset(os_traits.get_traits())

#: CPU features whose name in the kernel differs from their traits'. Features
#: for virtual machine monitors, such as vmx, svm or sev, are omitted: a
#: container would not get what such a trait promises.
_X86_NAMES = {
    'aes': ('HW_CPU_X86_AESNI',),
    'fma': ('HW_CPU_X86_FMA3',),
    'hle': ('HW_CPU_X86_TSX',),
    'pclmulqdq': ('HW_CPU_X86_CLMUL',),
    'pni': ('HW_CPU_X86_SSE3',),
    'rtm': ('HW_CPU_X86_TSX',),
    'sha_ni': ('HW_CPU_X86_SHA',),
    'gfni': ('HW_CPU_X86_AVX512GFNI',),
    'vaes': ('HW_CPU_X86_AVX512VAES',),
    'vpclmulqdq': ('HW_CPU_X86_AVX512VPCLMULQDQ',),
    'bmi1': ('HW_CPU_X86_BMI',),
}

#: Features with a trait for each vendor.
_X86_VENDOR_NAMES = {
    ('AuthenticAMD', 'ibpb'): 'HW_CPU_X86_AMD_IBPB',
    ('AuthenticAMD', 'ssbd'): 'HW_CPU_X86_AMD_SSBD',
    ('AuthenticAMD', 'virt_ssbd'): 'HW_CPU_X86_AMD_VIRT_SSBD',
    ('GenuineIntel', 'ibrs'): 'HW_CPU_X86_INTEL_SPEC_CTRL',
    ('GenuineIntel', 'md_clear'): 'HW_CPU_X86_INTEL_MD_CLEAR',
    ('GenuineIntel', 'pcid'): 'HW_CPU_X86_INTEL_PCID',
    ('GenuineIntel', 'ssbd'): 'HW_CPU_X86_INTEL_SSBD',
}

#: Traits that must not be derived from the name of a feature.
_NOT_FOR_CONTAINERS = frozenset({
    'HW_CPU_X86_VMX', 'HW_CPU_X86_SVM', 'HW_CPU_X86_SGX', 'HW_CPU_X86_SEV',
    'HW_CPU_AMD_SEV'})

_FAMILIES = {'x86_64': 'HW_CPU_X86_', 'i686': 'HW_CPU_X86_',
             'aarch64': 'HW_CPU_AARCH64_', 'ppc64le': 'HW_CPU_PPC64LE_'}

_OWNED_PREFIXES = (_SERVER, _POOL, _KERNEL, 'HW_ARCH_', *_DEVICES.values())


def _possible_cpu_traits() -> frozenset[str]:
    """List all CPU traits that the driver may report."""
    found = {trait for trait in _STANDARD
             if trait.startswith(tuple(_FAMILIES.values())) and
             not re.match(r'HW_CPU_X86_(?:AMD|INTEL)_', trait)}
    for traits in _X86_NAMES.values():
        found.update(traits)
    found.update(_X86_VENDOR_NAMES.values())
    return frozenset(found & _STANDARD) - _NOT_FOR_CONTAINERS


_OWNED = _possible_cpu_traits() | {
    HYPERTHREADING, ISOLATED_IDMAP, NESTING, PRIVILEGED}


def owned(traits: Iterable[str]) -> frozenset[str]:
    """Return the traits that only the driver reports.

    :param traits: any traits.
    :returns: those of them that the driver may add and remove.
    """
    return frozenset(trait for trait in traits
                     if trait in _OWNED or trait.startswith(_OWNED_PREFIXES))


def local_cpu_features(path: str = '/proc/cpuinfo') -> frozenset[str]:
    """Return the features of this machine's CPUs, by the kernel's names.

    :param path: path of the kernel's description of the CPUs.
    :returns: features of the first CPU, which stands for all of them.
    """
    with open(path, encoding='utf-8', errors='replace') as stream:
        for line in stream:
            key, _colon, value = line.partition(':')
            key = key.strip().lower()
            if key in ('flags', 'features'):
                return frozenset(value.lower().split())
            # POWER has a generation instead of a list of features.
            if key == 'cpu' and 'power' in value.lower():
                return frozenset(
                    re.findall(r'power\d+', value.lower()))
    return frozenset()


def from_cpu_features(architectures: Iterable[str], features: Iterable[str],
                      vendor: str) -> frozenset[str]:
    """Return the traits of CPU features.

    :param architectures: Nova's names, the host's native one first.
    :param features: the kernel's names of features.
    :param vendor: the kernel's name of the CPU vendor.
    :returns: traits that exist in the installed os-traits.
    """
    family = next((_FAMILIES[arch] for arch in architectures
                   if arch in _FAMILIES), None)
    if family is None:
        return frozenset()
    found: set[str] = set()
    for feature in features:
        found.add(family + feature.upper().replace('_', ''))
        if family == 'HW_CPU_X86_':
            found.update(_X86_NAMES.get(feature, ()))
            found.add(_X86_VENDOR_NAMES.get((vendor, feature), ''))
    return frozenset(found & _OWNED)


def architecture(name: str) -> str:
    """Return the trait of an architecture.

    :param name: Nova's name of the architecture.
    :returns: the trait, or '' if there is none.
    """
    # os-traits names families of 32-bit ARM, Nova the instruction sets.
    name = {'armv6l': 'armv6', 'armv7l': 'armv7', 'armv7b': 'armv7b'}.get(
        name, name)
    trait = f'HW_ARCH_{name.upper()}'
    return trait if trait in _STANDARD else ''


def from_server(environment: Mapping[str, Any]) -> frozenset[str]:
    """Return the traits of the LXD server and the kernel.

    :param environment: the ``environment`` of LXD's server description.
    :returns: the traits.
    """
    found = {_SERVER + os_traits_name(environment.get('server', 'lxd'))}
    for feature, value in (environment.get('kernel_features') or {}).items():
        if value == 'true':
            found.add(_KERNEL + os_traits_name(feature))
    return frozenset(found)


def pool(driver: str) -> str:
    """Return the trait of a storage driver.

    :param driver: LXD's name of the driver, such as ``btrfs``.
    """
    return _POOL + os_traits_name(driver)


def from_devices(devices: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Return the traits of devices that can be passed through.

    :param devices: kinds and ids, such as ``('gpu', '10de:1db4')``.
    """
    return frozenset(_DEVICES[kind] + os_traits_name(ids)
                     for kind, ids in devices)


def from_project(config: Mapping[str, str]) -> frozenset[str]:
    """Return the traits of what the LXD project lets flavors allow.

    :param config: the configuration of the driver's LXD project.
    :returns: the traits.
    """
    if config.get('restricted') != 'true':
        return frozenset({NESTING, PRIVILEGED})
    found = set()
    if config.get('restricted.containers.nesting') == 'allow':
        found.add(NESTING)
    if config.get('restricted.containers.privilege') == 'allow':
        found.add(PRIVILEGED)
    return frozenset(found)


def os_traits_name(text: str) -> str:
    """Convert a word to the form of a trait's name.

    :param text: any word.
    :returns: upper case, with ``_`` for characters that traits cannot have.
    """
    return re.sub(r'[^A-Z0-9]+', '_', text.upper())
