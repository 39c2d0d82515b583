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
"""Glance images in LXD's image store.

The alias ``glance-<Glance image id>`` of an LXD image is the only record of
its import. It is set last, so that an incomplete import is never used; an
image that a crash has left without an alias is used by the next import of the
same image, or ages out.

Earlier versions passed the metadata of tenants' images on to LXD. Their
aliases begin with ``nova-``; such images are transferred again when they are
needed, and age out.
"""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import threading
import time
from typing import Any

from nova.compute import utils as compute_utils
from nova import conf as nova_conf
from nova import exception
from nova.image import glance
from nova import objects
from oslo_concurrency import lockutils
from oslo_log import log as logging

from nova_lxd_py.virt.image import failures
from nova_lxd_py.virt.image import signatures
from nova_lxd_py.virt.image import transfer as image_transfer
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: What the aliases of the driver's images begin with. An image can bring
#: properties, but not an alias: it says that this version has checked it.
ALIAS_PREFIX = 'glance-'
#: What they began with before images were checked.
_OLD_ALIAS_PREFIX = 'nova-'

#: LXD image properties. LXD shows them to an instance's owner as ``image.*``,
#: so they hold nothing confidential.
PROPERTY_IMAGE = 'nova.image_id'
PROPERTY_SIZE = 'nova.unpacked_bytes'
PROPERTY_UNUSED = 'nova.unused_since'
PROPERTY_CHECKED = 'nova.checked'

_LONGEST_NAME = 255


class ImageStore:
    """Imports Glance images into LXD and removes them again.

    :param session: the LXD session.
    :param image_api: what Nova talks to Glance with, by default
        :class:`nova.image.glance.API`.
    """

    def __init__(self, session: lxd.Session,
                 image_api: Any = None) -> None:
        self._session = session
        self._options = session.options
        self._image_api = image_api or glance.API()
        self._imports = threading.BoundedSemaphore(
            session.options.image_parallel_imports)
        # Which image an alias meant the last time it was looked up.
        self._fingerprints: dict[str, str] = {}

    # -- import -------------------------------------------------------------

    def describe(self, context: Any, image_id: str) -> objects.ImageMeta:
        """Return Glance's description of an image.

        :param context: the request's context.
        :param image_id: Glance's id of the image.
        :returns: Nova's description of it.
        :raises nova.exception.ImageNotFound: if Glance does not have it.
        """
        return objects.ImageMeta.from_image_ref(context, self._image_api,
                                                image_id)

    def ensure(self, context: Any, image_meta: objects.ImageMeta,
               instance: objects.Instance, disk_gb: int | None = None,
               source: Any = None) -> str:
        """Ensure that LXD has an image for an instance to be created from.

        It is transferred once, however many servers need it at the same time.

        :param context: the request's context, for Glance.
        :param image_meta: the image; its id must be set.
        :param instance: the instance.
        :param disk_gb: GiB that the image must fit into, 0 for any number; by
            default what the server's flavor has.
        :param source: what to download it from, where it is not in Glance
            any more; an object with Glance's method ``download``.
        :returns: the image's fingerprint in LXD.
        :raises nova.exception.FlavorDiskSmallerThanImage: if it does not fit.
        :raises nova.exception.FlavorDiskSmallerThanMinDisk: if the image
            says so itself.
        :raises nova.exception.ImageUnacceptable: if no container can be made
            from it; LXD has kept nothing of it.
        :raises nova.exception.NovaException: if Glance does not deliver it.
        :raises errors.LXDError: if LXD does not accept it.
        """
        if disk_gb is None:
            disk_gb = instance.flavor.root_gb
        _check_min_disk(image_meta, disk_gb)
        image, _new = self._find_or_transfer(
            context, image_meta, instance.trusted_certs, instance, source)
        _check_size(image, disk_gb)
        return image['fingerprint']

    def has(self, image_id: str) -> bool:
        """Return whether LXD has an image.

        :param image_id: id of the image that was given to :meth:`ensure`.
        :raises errors.LXDError: if LXD does not answer.
        """
        return self._find(image_id) is not None

    def cache_image(self, context: Any, image_id: str) -> bool:
        """Transfer an image to LXD before instances are created from it.

        See :meth:`nova.virt.driver.ComputeDriver.cache_image`.

        :param context: the request's context, for Glance.
        :param image_id: Glance's id of the image.
        :returns: True if it had to be transferred, False if it was there.
        :raises nova.exception.NovaException: as in :meth:`ensure`.
        """
        return self._find_or_transfer(
            context, self.describe(context, image_id), None, None)[1]

    def _find_or_transfer(self, context: Any, meta: objects.ImageMeta,
                          trusted_certs: Any, instance: Any, source: Any = None
                          ) -> tuple[dict[str, Any], bool]:
        """Find an image, or transfer it.

        :returns: LXD's description of it, and whether it is new.
        """
        with _lock(meta.id):
            image = self._find(meta.id)
            demanded = signatures.required_signature(meta.id, trusted_certs)
            if image is not None and signatures.is_verified(
                    demanded, image['properties'].get(PROPERTY_CHECKED)):
                self._mark_used(image)
                return image, False
            # Nova's own limit for heavy disk work comes on top. Its object
            # is replaced at start-up, so it must be looked up each time.
            with self._imports, compute_utils.disk_ops_semaphore:
                if image is not None:
                    return self._check_again(context, meta, trusted_certs,
                                             instance, image), False
                return self._import(context, meta, trusted_certs, instance,
                                    source), True

    def _find(self, image_id: str) -> dict[str, Any] | None:
        name = ALIAS_PREFIX + image_id
        try:
            # An image names its aliases: one request instead of two.
            if image_id in self._fingerprints:
                image = self._session.get('images',
                                          self._fingerprints[image_id])
                if any(alias['name'] == name for alias in image['aliases']):
                    return image
        except errors.NotFound:
            pass
        self._fingerprints.pop(image_id, None)
        try:
            alias = self._session.get('images', 'aliases', name)
            image = self._session.get('images', alias['target'])
        except errors.NotFound:
            return None
        self._fingerprints[image_id] = alias['target']
        return image

    def _mark_used(self, image: dict[str, Any]) -> None:
        if image['properties'].get(PROPERTY_UNUSED):
            self._set_properties(image['fingerprint'], {PROPERTY_UNUSED: ''})

    def _set_properties(self, fingerprint: str, properties: dict[str, str]
                        ) -> None:
        self._session.patch('images', fingerprint,
                            body={'properties': properties})

    def _check_again(self, context: Any, meta: objects.ImageMeta,
                     trusted_certs: Any, instance: Any, image: dict[str, Any]
                     ) -> dict[str, Any]:
        """Check the signature of an image that was imported for a server that
        did not demand this."""
        LOG.info('Image %s is in LXD, but its signature has not been checked '
                 'as this server demands; transferring it once more for that',
                 meta.id, instance=instance)
        imported = self._transfer(context, meta, trusted_certs, instance)
        if imported.fingerprint != image['fingerprint']:
            if not imported.existed:
                image_transfer.drop_unnamed(self._session,
                                            imported.fingerprint)
            raise exception.ImageUnacceptable(
                image_id=meta.id,
                reason='its content is not what this host has of it from '
                       'before; upload it again, as another image')
        self._set_properties(image['fingerprint'], {
            PROPERTY_UNUSED: '',
            **self._checked(meta, trusted_certs, image['fingerprint'])})
        return self._session.get('images', image['fingerprint'])

    def _checked(self, meta: objects.ImageMeta, trusted_certs: Any,
                 fingerprint: str) -> dict[str, str]:
        """Return the properties that record that the signature of an image
        was checked."""
        demanded = signatures.required_signature(meta.id, trusted_certs)
        if not demanded:
            return {}
        properties = self._session.get('images', fingerprint)['properties']
        return {PROPERTY_CHECKED: signatures.noted(
            demanded, properties.get(PROPERTY_CHECKED))}

    def _import(self, context: Any, meta: objects.ImageMeta,
                trusted_certs: Any, instance: Any, source: Any
                ) -> dict[str, Any]:
        LOG.info('Transferring image %s from %s to LXD', meta.id,
                 'Glance' if source is None else 'a volume',
                 instance=instance)
        imported = self._transfer(context, meta, trusted_certs, instance,
                                  source)
        with contextlib.ExitStack() as undo:
            if not imported.existed:
                undo.callback(image_transfer.drop_unnamed, self._session,
                              imported.fingerprint)
            self._set_properties(imported.fingerprint, {
                PROPERTY_SIZE: str(imported.content.unpacked_size),
                PROPERTY_UNUSED: '',
                **self._checked(meta, trusted_certs, imported.fingerprint)})
            self._session.post('images', 'aliases', body={
                'name': ALIAS_PREFIX + meta.id,
                'target': imported.fingerprint,
                'description': _description(meta)})
            undo.pop_all()
        return self._session.get('images', imported.fingerprint)

    def _transfer(self, context: Any, meta: objects.ImageMeta,
                  trusted_certs: Any, instance: Any, source: Any = None
                  ) -> image_transfer.Imported:
        return image_transfer.Transfer(
            self._session, source or self._image_api, meta,
            self._options.image_max_unpacked_gb << 30,
            self._options.image_timeout, instance,
        ).run(context, trusted_certs, {PROPERTY_IMAGE: meta.id,
                                       'description': _description(meta)})

    # -- failures -----------------------------------------------------------

    def explain_create_failure(self, error: errors.LXDError,
                               instance: objects.Instance,
                               image_meta: objects.ImageMeta) -> Exception:
        """Return the exception to raise when LXD could not create a root disk.

        An image that LXD cannot unpack is removed from LXD, so that a later
        server gets what Glance has then.

        :param error: the error from LXD.
        :param instance: the instance.
        :param image_meta: its image.
        :returns: the exception: Nova's if the image or the flavor is to
            blame, otherwise the error itself.
        """
        if failures.is_disk_full(error):
            return self._explain_full_disk(error, instance, image_meta)
        reason = failures.create_reason(error)
        if reason is None:
            return error
        LOG.error('LXD could not make a root disk of image %s: %s',
                  image_meta.id, error, instance=instance)
        self.forget(image_meta.id)
        return exception.ImageUnacceptable(image_id=image_meta.id,
                                           reason=reason)

    def explain_start_failure(self, error: errors.LXDError,
                              instance: objects.Instance,
                              image_meta: objects.ImageMeta, name: str
                              ) -> Exception:
        """Return the exception to raise when LXD could not start a new
        instance.

        :param error: the error from LXD.
        :param instance: the instance.
        :param image_meta: its image; without an ID if it boots from a volume.
        :param name: name of the LXD instance.
        :returns: the exception: Nova's if the image is to blame, so that the
            build is not tried again on other hosts, otherwise the error
            itself.
        """
        reason = failures.start_reason(self._session, name)
        if reason is None:
            return error
        if not image_meta.obj_attr_is_set('id'):
            LOG.error('The root volume cannot be started: %s: %s', reason,
                      error, instance=instance)
            return exception.BuildAbortException(
                instance_uuid=instance.uuid,
                reason=f'the server cannot boot from its volume: {reason}')
        LOG.error('Image %s cannot be started: %s: %s', image_meta.id, reason,
                  error, instance=instance)
        return exception.ImageUnacceptable(image_id=image_meta.id,
                                           reason=reason)

    def _explain_full_disk(self, error: errors.LXDError,
                           instance: objects.Instance,
                           image_meta: objects.ImageMeta) -> Exception:
        image = self._find(image_meta.id)
        size = _unpacked_size(image) if image is not None else 0
        disk = instance.flavor.root_gb << 30
        # File systems need more than the sum of what is in them. Where the
        # flavor has plenty, it is the pool that is full.
        if disk and size * 5 // 4 > disk:
            return exception.FlavorDiskSmallerThanImage(flavor_size=disk,
                                                        image_size=size)
        return error

    def forget(self, image_id: str) -> None:
        """Remove an image from LXD; one that is not there is a success.

        :param image_id: Glance's id of the image.
        """
        with _lock(image_id):
            image = self._find(image_id)
            if image is not None:
                try:
                    self._remove(image)
                except errors.LXDError as exc:
                    LOG.warning('Could not remove image %s from LXD: %s',
                                image_id, exc)

    # -- removal ------------------------------------------------------------

    def manage_cache(self, all_instances: Iterable[objects.Instance]) -> None:
        """Remove images that no server of this host has used for long.

        See :meth:`nova.virt.driver.ComputeDriver.manage_image_cache`; the
        options ``[image_cache] remove_unused_base_images`` and
        ``remove_unused_original_minimum_age_seconds`` apply.

        :param all_instances: the servers whose images are in use.
        """
        self.prune(used_images(all_instances))

    def prune(self, used: set[str]) -> list[str]:
        """Remove images that have not been used for long.

        :param used: Glance's ids of the images in use.
        :returns: fingerprints of the images removed.
        """
        if not CONF.image_cache.remove_unused_base_images:
            return []
        removed = []
        for image in self._session.get('images', params={'recursion': 1}):
            ids = _glance_ids(image)
            if not ids:
                continue
            try:
                if self._age(image, ids, used):
                    removed.append(image['fingerprint'])
            except errors.LXDError as exc:
                LOG.warning('Could not check the use of LXD image %s: %s',
                            image['fingerprint'], exc)
        return removed

    def _age(self, image: dict[str, Any], ids: set[str], used: set[str]
             ) -> bool:
        """Record whether an image is in use, and remove it if it has been
        unused for too long.

        :returns: whether it was removed.
        """
        if ids & used:
            self._mark_used(image)
            return False
        with contextlib.ExitStack() as locks:
            for image_id in sorted(ids):
                locks.enter_context(_lock(image_id))
            # A server may have asked for it since the list was made.
            try:
                image = self._session.get('images', image['fingerprint'])
            except errors.NotFound:
                return False
            if not _glance_ids(image) <= ids:
                return False
            now = int(time.time())
            since = _number(image['properties'].get(PROPERTY_UNUSED))
            if since is None or since > now:
                since = now
                self._set_properties(image['fingerprint'],
                                     {PROPERTY_UNUSED: str(now)})
            if now - since < (CONF.image_cache.
                              remove_unused_original_minimum_age_seconds):
                return False
            LOG.info('Removing image %s from LXD: no server of this host has '
                     'used it for %d seconds', ', '.join(sorted(ids)),
                     now - since)
            self._remove(image)
            return True

    def _remove(self, image: dict[str, Any]) -> None:
        """Remove the driver's aliases of an image, and the image itself if the
        driver has imported it and it has no other alias."""
        ours = [alias['name'] for alias in image['aliases']
                if alias['name'].startswith((ALIAS_PREFIX,
                                             _OLD_ALIAS_PREFIX))]
        with contextlib.suppress(errors.NotFound):
            if (PROPERTY_IMAGE in image['properties'] and
                    len(ours) == len(image['aliases'])):
                # LXD deletes its aliases with it.
                self._session.delete('images', image['fingerprint'])
                return
        for name in ours:
            with contextlib.suppress(errors.NotFound):
                self._session.delete('images', 'aliases', name)


def used_images(all_instances: Iterable[objects.Instance]) -> set[str]:
    """Return the images that servers use.

    :param all_instances: the servers.
    :returns: Glance's ids.
    """
    used = set()
    for instance in all_instances:
        used.add(instance.image_ref)
        if instance.obj_attr_is_set('system_metadata'):
            used.add(instance.system_metadata.get('image_base_image_ref'))
    return {image_id for image_id in used if image_id}


def _lock(image_id: str) -> contextlib.AbstractContextManager[Any]:
    """Lock an image against other threads. No other process uses it:
    nova-compute services must not share an LXD project."""
    return lockutils.lock(f'lxd-image-{image_id}', lock_file_prefix=None)


def _glance_ids(image: dict[str, Any]) -> set[str]:
    """Return the ids of the Glance images that an LXD image came from."""
    ids = {alias['name'].removeprefix(ALIAS_PREFIX)
           for alias in image['aliases']
           if alias['name'].startswith(ALIAS_PREFIX)}
    # Images of earlier versions are not used any more, not even if a server
    # has their id: with the prefix it equals no server's.
    ids.update(alias['name'] for alias in image['aliases']
               if alias['name'].startswith(_OLD_ALIAS_PREFIX))
    if not image['aliases'] and PROPERTY_IMAGE in image['properties']:
        # Left by an import that was interrupted just before its end.
        ids.add(image['properties'][PROPERTY_IMAGE])
    return ids


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _unpacked_size(image: dict[str, Any]) -> int:
    return _number(image['properties'].get(PROPERTY_SIZE)) or 0


def _check_size(image: dict[str, Any], disk_gb: int) -> None:
    """Check that an image fits the root disk. LXD does so on some pools only,
    and not before it unpacks the image."""
    size, disk = _unpacked_size(image), disk_gb << 30
    if disk and size > disk:
        raise exception.FlavorDiskSmallerThanImage(flavor_size=disk,
                                                   image_size=size)


def _description(meta: objects.ImageMeta) -> str:
    name = meta.name if meta.obj_attr_is_set('name') else ''
    return f'Glance image {name}'[:_LONGEST_NAME]


def _check_min_disk(meta: objects.ImageMeta, disk_gb: int) -> None:
    wanted = (meta.min_disk if meta.obj_attr_is_set('min_disk') else 0) or 0
    if disk_gb and wanted > disk_gb:
        raise exception.FlavorDiskSmallerThanMinDisk(
            flavor_size=disk_gb << 30, image_min_disk=wanted << 30)
