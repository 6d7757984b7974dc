//! Names and records that the hub stores and cannot read. PROTOCOL.md, "Names".

use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use connect_spec::{
    bytes::Blob,
    control::SealedRecord,
    ids::{AgentId, CredentialId, LookupTag, ServiceId, ServiceName, WorkspaceId},
    keys::IdentityKey,
    limits::{MAX_RECORD_PLAINTEXT_BYTES, TAG_BYTES},
    objects::{AgentRecord, ServiceRecord, ShareRecord},
    signed::{Body, ObjectError, Signed},
};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use crate::{
    epoch::NameSource,
    error::CryptoError,
    kdf::kdf,
    keys::SigningKey,
    secret::{self, Secret, redacted},
};

/// First bytes of the associated data of every record.
const RECORD_LABEL: &[u8] = b"connect/v1 record";
/// Nonce of XChaCha20-Poly1305: long enough to be drawn at random.
const NONCE_BYTES: usize = 24;

/// The keys of one epoch that hide names: one seals records, the other makes lookup tags.
pub struct NameKeys {
    name_key: Secret<32>,
    index_key: Secret<32>,
}

redacted!(NameKeys);

/// The id under which an agent offers the service of a name: the same whenever it does, and telling
/// nothing of the name. `KDF(seed of the identity key, "service " || name)[..16]`; nobody else can check it.
#[must_use]
pub fn service_id(identity: &SigningKey, name: &ServiceName) -> ServiceId {
    let label = [b"service ".as_slice(), name.as_str().as_bytes()].concat();
    ServiceId(*kdf(identity.seed(), &label).first_chunk().expect("32 bytes begin with 16"))
}

/// Where a record belongs; sealed into it as associated data.
struct Place {
    workspace: WorkspaceId,
    /// The service, or the agent itself for its own record.
    object: [u8; 16],
    agent: AgentId,
    epoch: u32,
    counter: u32,
}

impl Place {
    fn associated_data(&self) -> Vec<u8> {
        let parts: [&[u8]; 7] = [
            RECORD_LABEL,
            &[0],
            &self.workspace.0,
            &self.object,
            &self.agent.0,
            &self.epoch.to_be_bytes(),
            &self.counter.to_be_bytes(),
        ];
        parts.concat()
    }
}

impl NameKeys {
    /// Derives the keys of the epoch that `source` belongs to.
    #[must_use]
    pub fn derive(source: &NameSource) -> Self {
        let derive = |label| secret::boxed(&kdf(source.as_bytes(), label));
        Self { name_key: derive(b"names"), index_key: derive(b"index") }
    }

    /// Where the hub finds the service of this name.
    #[must_use]
    pub fn tag(&self, name: &ServiceName) -> LookupTag {
        let tag = kdf(&self.index_key, name.as_str().as_bytes());
        LookupTag(*tag.first_chunk().expect("32 bytes begin with 16"))
    }

    /// Seals what an exposer says of a service.
    ///
    /// # Errors
    /// [`CryptoError::Object`] when the record is too long.
    pub fn seal_service(
        &self,
        record: &Signed<ServiceRecord>,
        rng: &mut impl CryptoRng,
    ) -> Result<SealedRecord, CryptoError> {
        self.seal(&service_place(record.object()), record, rng)
    }

    /// Opens the record of a service as the hub lists it.
    ///
    /// The name, the counter already seen, and the certificate in it are the caller's to judge.
    ///
    /// # Errors
    /// [`CryptoError::Open`], [`CryptoError::Object`], and [`CryptoError::Misplaced`] when the record
    /// was sealed for another place or is not signed by the identity that its certificate names.
    pub fn open_service(
        &self,
        workspace: &WorkspaceId,
        service: ServiceId,
        agent: AgentId,
        sealed: &SealedRecord,
    ) -> Result<Signed<ServiceRecord>, CryptoError> {
        let outer = Place {
            workspace: *workspace,
            object: service.0,
            agent,
            epoch: sealed.epoch,
            counter: sealed.counter,
        };
        let record: Signed<ServiceRecord> = self.open(&outer, &sealed.sealed)?;
        let certificate = record.object().certificate.object();
        let belongs = outer.associated_data() == service_place(record.object()).associated_data()
            && certificate.workspace_id == *workspace
            && certificate.agent_id() == agent
            && record.verify_by(&certificate.identity_key).is_ok();
        if belongs { Ok(record) } else { Err(CryptoError::Misplaced) }
    }

    /// Seals what an agent says of itself.
    ///
    /// # Errors
    /// [`CryptoError::Object`] when the record is too long.
    pub fn seal_agent(
        &self,
        record: &Signed<AgentRecord>,
        rng: &mut impl CryptoRng,
    ) -> Result<SealedRecord, CryptoError> {
        self.seal(&agent_place(record.object()), record, rng)
    }

    /// Opens an agent's record as the hub lists it.
    ///
    /// # Errors
    /// [`CryptoError::Open`], [`CryptoError::Object`], and [`CryptoError::Misplaced`] when the record
    /// was sealed for another place or is not signed by `identity`.
    ///
    /// # Security
    /// `identity` must come from a verified certificate.
    pub fn open_agent(
        &self,
        workspace: &WorkspaceId,
        agent: AgentId,
        identity: &IdentityKey,
        sealed: &SealedRecord,
    ) -> Result<Signed<AgentRecord>, CryptoError> {
        let outer = Place {
            workspace: *workspace,
            object: agent.0,
            agent,
            epoch: sealed.epoch,
            counter: sealed.counter,
        };
        let record: Signed<AgentRecord> = self.open(&outer, &sealed.sealed)?;
        let belongs = outer.associated_data() == agent_place(record.object()).associated_data()
            && AgentId::of(workspace, identity) == agent
            && record.verify_by(identity).is_ok();
        if belongs { Ok(record) } else { Err(CryptoError::Misplaced) }
    }

    /// Seals what a signer says of a share, under the share's own keys.
    ///
    /// # Errors
    /// [`CryptoError::Object`] when the record is too long.
    pub fn seal_share(
        &self,
        record: &Signed<ShareRecord>,
        rng: &mut impl CryptoRng,
    ) -> Result<Blob, CryptoError> {
        self.seal(&share_place(record.object()), record, rng).map(|sealed| sealed.sealed)
    }

    /// Opens the record of a share as the hub lists it.
    ///
    /// # Errors
    /// [`CryptoError::Open`], [`CryptoError::Object`], and [`CryptoError::Misplaced`] when the record
    /// is that of another share or is not signed by `issuer`.
    ///
    /// # Security
    /// `issuer` must come from a verified credential.
    pub fn open_share(
        &self,
        workspace: &WorkspaceId,
        share: CredentialId,
        issuer: &IdentityKey,
        sealed: &Blob,
    ) -> Result<Signed<ShareRecord>, CryptoError> {
        let outer = place_of_share(*workspace, share);
        let record: Signed<ShareRecord> = self.open(&outer, sealed)?;
        let belongs = outer.associated_data() == share_place(record.object()).associated_data()
            && record.verify_by(issuer).is_ok();
        if belongs { Ok(record) } else { Err(CryptoError::Misplaced) }
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new_from_slice(self.name_key.as_slice()).expect("the key has 32 bytes")
    }

    fn seal<T: Body>(
        &self,
        place: &Place,
        record: &Signed<T>,
        rng: &mut impl CryptoRng,
    ) -> Result<SealedRecord, CryptoError> {
        let plaintext = pad(&record.encode())?;
        let mut nonce = XNonce::default();
        rng.fill_bytes(nonce.as_mut_slice());
        let payload = Payload { msg: &plaintext, aad: &place.associated_data() };
        let ciphertext = self
            .cipher()
            .encrypt(&nonce, payload)
            .expect("8 KiB are no length that the cipher refuses");
        Ok(SealedRecord {
            epoch: place.epoch,
            counter: place.counter,
            sealed: Blob([nonce.as_slice(), &ciphertext].concat()),
        })
    }

    fn open<T: Body>(&self, place: &Place, sealed: &Blob) -> Result<Signed<T>, CryptoError> {
        if sealed.0.len() > NONCE_BYTES + MAX_RECORD_PLAINTEXT_BYTES + TAG_BYTES {
            return Err(CryptoError::Open);
        }
        let (nonce, ciphertext) =
            sealed.0.split_first_chunk::<NONCE_BYTES>().ok_or(CryptoError::Open)?;
        let payload = Payload { msg: ciphertext, aad: &place.associated_data() };
        let plaintext = self
            .cipher()
            .decrypt(&(*nonce).into(), payload)
            .map(Zeroizing::new)
            .map_err(|_| CryptoError::Open)?;
        Ok(Signed::decode(unpad(&plaintext)?)?)
    }
}

fn service_place(record: &ServiceRecord) -> Place {
    Place {
        workspace: record.workspace_id,
        object: record.service_id.0,
        agent: record.agent_id,
        epoch: record.epoch,
        counter: record.counter,
    }
}

fn share_place(record: &ShareRecord) -> Place {
    place_of_share(record.workspace_id, record.share_id)
}

/// A share belongs to no agent, and its record never changes.
fn place_of_share(workspace: WorkspaceId, share: CredentialId) -> Place {
    Place { workspace, object: share.0, agent: AgentId([0; 16]), epoch: 0, counter: 0 }
}

fn agent_place(record: &AgentRecord) -> Place {
    Place {
        workspace: record.workspace_id,
        object: record.agent_id.0,
        agent: record.agent_id,
        epoch: record.epoch,
        counter: record.counter,
    }
}

/// The few lengths that a record can have, so that its length tells little of its name.
fn padded_length(used: usize) -> usize {
    match used {
        0..=256 => 256,
        257..=512 => 512,
        more => more.next_multiple_of(1024),
    }
}

/// `u16 length || wire || zeros`.
fn pad(wire: &[u8]) -> Result<Zeroizing<Vec<u8>>, ObjectError> {
    let too_long = ObjectError::TooLong(MAX_RECORD_PLAINTEXT_BYTES);
    let length = u16::try_from(wire.len()).map_err(|_| too_long)?;
    let padded = padded_length(2 + wire.len());
    if padded > MAX_RECORD_PLAINTEXT_BYTES {
        return Err(too_long);
    }
    let mut plaintext = Zeroizing::new(vec![0; padded]);
    plaintext[..2].copy_from_slice(&length.to_be_bytes());
    plaintext[2..2 + wire.len()].copy_from_slice(wire);
    Ok(plaintext)
}

fn unpad(plaintext: &[u8]) -> Result<&[u8], ObjectError> {
    let (length, rest) = plaintext.split_first_chunk::<2>().ok_or(ObjectError::Envelope)?;
    let (wire, padding) = rest
        .split_at_checked(usize::from(u16::from_be_bytes(*length)))
        .ok_or(ObjectError::Envelope)?;
    let shortest = padded_length(2 + wire.len()) == plaintext.len();
    if shortest && padding.iter().all(|byte| *byte == 0) {
        Ok(wire)
    } else {
        Err(ObjectError::Envelope)
    }
}

#[cfg(test)]
mod tests {
    use connect_spec::objects::Certificate;

    use super::*;
    use crate::test_world::{TestRng, World, bytes};

    /// Whoever has the key seals what it likes where it likes, and signs what it likes.
    #[test]
    fn a_record_that_says_another_place_than_it_is_sealed_for_is_refused() {
        let world = World::new();
        let (member, other) = (world.member("member"), world.member("other"));
        let (workspace, id, identity) = (world.workspace, member.id(), member.identity.public());
        let keys = NameKeys::derive(&world.epoch.names);
        let rng = &mut TestRng::new("seal");

        let record = member.identity.sign(&world.service_record(&member));
        let sound = || service_place(record.object());
        let mut service = |place: Place| {
            let sealed = keys.seal(&place, &record, rng).unwrap();
            keys.open_service(&workspace, ServiceId(place.object), place.agent, &sealed).err()
        };
        assert_eq!(service(sound()), None);
        for place in [
            Place { object: bytes("other"), ..sound() },
            Place { agent: other.id(), ..sound() },
            Place { epoch: 1, ..sound() },
            Place { counter: 8, ..sound() },
        ] {
            assert_eq!(service(place), Some(CryptoError::Misplaced));
        }

        let record = member.identity.sign(&world.agent_record(&member));
        let sound = || agent_place(record.object());
        let mut agent = |place: Place| {
            let sealed = keys.seal(&place, &record, rng).unwrap();
            keys.open_agent(&workspace, place.agent, &identity, &sealed).err()
        };
        assert_eq!(agent(sound()), None);
        for place in [Place { epoch: 1, ..sound() }, Place { counter: 8, ..sound() }] {
            assert_eq!(agent(place), Some(CryptoError::Misplaced));
        }
        // At another agent's place, and saying so.
        let stolen = AgentRecord { agent_id: other.id(), ..world.agent_record(&member) };
        let sealed = keys.seal_agent(&member.identity.sign(&stolen), rng).unwrap();
        let opened = keys.open_agent(&workspace, other.id(), &identity, &sealed);
        assert_eq!(opened.err(), Some(CryptoError::Misplaced));

        // The id that the agent has in another workspace, with a certificate of there.
        let elsewhere = Certificate {
            workspace_id: WorkspaceId(bytes("elsewhere")),
            ..member.presented.certificate.object().clone()
        };
        let agent_id = elsewhere.agent_id();
        let certificate = world.signer.sign(&elsewhere);
        let record = ServiceRecord { agent_id, certificate, ..world.service_record(&member) };
        let place = service_place(&record);
        let sealed = keys.seal_service(&member.identity.sign(&record), rng).unwrap();
        let opened = keys.open_service(&workspace, ServiceId(place.object), agent_id, &sealed);
        assert_eq!(opened.err(), Some(CryptoError::Misplaced));

        let share = CredentialId(bytes("share"));
        let label = "for Ann".parse().unwrap();
        let record = ShareRecord { workspace_id: workspace, share_id: share, label, names: vec![] };
        let open = |at: CredentialId, sealed: &Blob| {
            keys.open_share(&workspace, at, &identity, sealed).err()
        };
        let signed = member.identity.sign(&record);
        assert_eq!(open(share, &keys.seal_share(&signed, rng).unwrap()), None);
        let moved = CredentialId(bytes("other share"));
        let sealed = keys.seal(&place_of_share(workspace, moved), &signed, rng).unwrap();
        assert_eq!(open(moved, &sealed.sealed), Some(CryptoError::Misplaced));
        let sealed = keys.seal_share(&other.identity.sign(&record), rng).unwrap();
        assert_eq!(open(share, &sealed), Some(CryptoError::Misplaced));
        assert_ne!(id, other.id());
    }

    #[test]
    fn a_record_over_the_limit_is_refused_unread() {
        let world = World::new();
        let member = world.member("member");
        let keys = NameKeys::derive(&world.epoch.names);
        let place = agent_place(&world.agent_record(&member));
        for (length, expected) in [
            (MAX_RECORD_PLAINTEXT_BYTES, CryptoError::Object(ObjectError::Envelope)),
            (MAX_RECORD_PLAINTEXT_BYTES + 1024, CryptoError::Open),
        ] {
            let nonce = XNonce::default();
            let payload = Payload { msg: &vec![0xff; length], aad: &place.associated_data() };
            let ciphertext = keys.cipher().encrypt(&nonce, payload).unwrap();
            let sealed = Blob([nonce.as_slice(), &ciphertext].concat());
            assert_eq!(keys.open::<AgentRecord>(&place, &sealed).err(), Some(expected));
        }
    }

    #[test]
    fn padding_has_steps_and_a_limit() {
        for (wire, padded) in [
            (0, 256),
            (254, 256),
            (255, 512),
            (510, 512),
            (511, 1024),
            (1022, 1024),
            (1023, 2048),
            (8190, 8192),
        ] {
            let plaintext = pad(&vec![7; wire]).unwrap();
            assert_eq!(plaintext.len(), padded);
            assert_eq!(unpad(&plaintext), Ok(vec![7; wire].as_slice()));
        }
        assert!(pad(&[7; 8191]).is_err());
        assert!(pad(&vec![7; 70_000]).is_err());
    }

    #[test]
    fn other_padding_is_refused() {
        let sound = pad(&[7; 100]).unwrap();
        let with = |change: fn(&mut Vec<u8>)| {
            let mut plaintext = sound.to_vec();
            change(&mut plaintext);
            plaintext
        };
        for plaintext in [
            Vec::new(),
            vec![0],
            with(|plaintext| plaintext[255] = 1),
            with(|plaintext| plaintext.resize(512, 0)),
            with(|plaintext| plaintext.truncate(102)),
            with(|plaintext| plaintext.truncate(255)),
            with(|plaintext| plaintext[0] = 1),
            with(|plaintext| plaintext[0] = 255),
        ] {
            assert_eq!(unpad(&plaintext), Err(ObjectError::Envelope));
        }
    }
}
