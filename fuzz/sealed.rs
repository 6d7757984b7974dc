//! Records that the hub keeps and cannot read, by a member that seals what it likes: the keys are fixed, and
//! every verdict is held against one that is found here from PROTOCOL.md alone.

use std::{fmt::Debug, sync::OnceLock};

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305,
    aead::{Aead as _, Payload},
};
use connect_crypto::{CryptoError, names::NameKeys};
use connect_spec::{
    bytes::Blob,
    control::SealedRecord,
    ids::{AgentId, CredentialId, ServiceId},
    objects::{AgentRecord, ServiceRecord, ShareRecord},
    signed::{Body, ObjectError, Signed},
};

use crate::{
    noise::kdf,
    world::{Agent, World, bytes},
};

const NONCE: [u8; 24] = [0x24; 24];

struct Fixed {
    world: World,
    member: Agent,
    keys: NameKeys,
    cipher: XChaCha20Poly1305,
}

fn fixed() -> &'static Fixed {
    static FIXED: OnceLock<Fixed> = OnceLock::new();
    FIXED.get_or_init(|| {
        let world = World::new();
        let member = world.member("member");
        let keys = NameKeys::derive(&world.epoch.names);
        let cipher = XChaCha20Poly1305::new(&kdf(world.epoch.names.as_bytes(), b"names").into());
        Fixed { world, member, keys, cipher }
    })
}

/// Where a record belongs.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    object: [u8; 16],
    agent: AgentId,
    epoch: u32,
    counter: u32,
}

impl Fixed {
    fn seal(&self, place: Place, plaintext: &[u8]) -> SealedRecord {
        let Place { object, agent, epoch, counter } = place;
        let aad = [
            b"connect/v1 record\0".as_slice(),
            &self.world.workspace.0,
            &object,
            &agent.0,
            &epoch.to_be_bytes(),
            &counter.to_be_bytes(),
        ]
        .concat();
        let payload = Payload { msg: plaintext, aad: &aad };
        let ciphertext = self.cipher.encrypt(&NONCE.into(), payload).expect("a short message");
        let sealed = Blob([&NONCE[..], &ciphertext].concat());
        SealedRecord { epoch, counter, sealed }
    }
}

/// `u16 length || wire || zeros`, to 256, 512 or a multiple of 1024 bytes.
fn padded(wire: &[u8]) -> Vec<u8> {
    let length = u16::try_from(wire.len()).unwrap_or(u16::MAX);
    let mut plaintext = [&length.to_be_bytes(), wire].concat();
    let used = plaintext.len();
    let steps = [256, 512].into_iter().find(|step| used <= *step);
    plaintext.resize(steps.unwrap_or_else(|| used.next_multiple_of(1024)), 0);
    plaintext
}

/// The wire in a plaintext that is padded as it must be, which only [`padded`] knows how to do.
fn unpadded(plaintext: &[u8]) -> Result<&[u8], CryptoError> {
    let wire = plaintext
        .split_first_chunk::<2>()
        .and_then(|(length, rest)| rest.get(..usize::from(u16::from_be_bytes(*length))));
    let wire = wire.filter(|wire| padded(wire) == plaintext);
    wire.ok_or(CryptoError::Object(ObjectError::Envelope))
}

/// Seals, opens and judges one plaintext at one place.
fn check<T: Body + Clone + PartialEq + Debug>(
    plaintext: &[u8],
    place: Place,
    open: impl FnOnce(&SealedRecord) -> Result<Signed<T>, CryptoError>,
    belongs: impl FnOnce(&Signed<T>) -> bool,
) -> Option<Signed<T>> {
    let expected = unpadded(plaintext).and_then(|wire| Ok(Signed::<T>::decode(wire)?));
    let expected = if plaintext.len() > 8192 { Err(CryptoError::Open) } else { expected };
    let decoded = expected.as_ref().ok().cloned();
    let expected = expected
        .and_then(|record| if belongs(&record) { Ok(record) } else { Err(CryptoError::Misplaced) });
    assert_eq!(open(&fixed().seal(place, plaintext)), expected);
    decoded
}

fn service(plaintext: &[u8], place: Place) -> Option<Signed<ServiceRecord>> {
    let Fixed { world, keys, .. } = fixed();
    let belongs = |record: &Signed<ServiceRecord>| {
        let object = record.object();
        let certificate = object.certificate.object();
        object.workspace_id == world.workspace
            && place_of_service(object) == place
            && certificate.workspace_id == world.workspace
            && certificate.agent_id() == place.agent
            && record.verify_by(&certificate.identity_key).is_ok()
    };
    let open = |sealed: &SealedRecord| {
        keys.open_service(&world.workspace, ServiceId(place.object), place.agent, sealed)
    };
    check(plaintext, place, open, belongs)
}

fn place_of_service(record: &ServiceRecord) -> Place {
    let ServiceRecord { service_id, agent_id, epoch, counter, .. } = record;
    Place { object: service_id.0, agent: *agent_id, epoch: *epoch, counter: *counter }
}

fn agent(plaintext: &[u8], place: Place) -> Option<Signed<AgentRecord>> {
    let Fixed { world, member, keys, .. } = fixed();
    let identity = member.identity.public();
    let belongs = |record: &Signed<AgentRecord>| {
        record.object().workspace_id == world.workspace
            && place_of_agent(record.object()) == place
            && place.agent == member.id()
            && record.verify_by(&identity).is_ok()
    };
    let open =
        |sealed: &SealedRecord| keys.open_agent(&world.workspace, place.agent, &identity, sealed);
    check(plaintext, place, open, belongs)
}

fn place_of_agent(record: &AgentRecord) -> Place {
    let AgentRecord { agent_id, epoch, counter, .. } = record;
    Place { object: agent_id.0, agent: *agent_id, epoch: *epoch, counter: *counter }
}

fn share(plaintext: &[u8], share: CredentialId) -> Option<Signed<ShareRecord>> {
    let Fixed { world, keys, .. } = fixed();
    let issuer = world.signer.public();
    let belongs = |record: &Signed<ShareRecord>| {
        let object = record.object();
        object.workspace_id == world.workspace
            && object.share_id == share
            && record.verify_by(&issuer).is_ok()
    };
    let open =
        |sealed: &SealedRecord| keys.open_share(&world.workspace, share, &issuer, &sealed.sealed);
    let place = Place { object: share.0, agent: AgentId([0; 16]), epoch: 0, counter: 0 };
    check(plaintext, place, open, belongs)
}

/// The first byte says what the others are: the wire or the whole plaintext of a record of one of three
/// kinds. A record that decodes is signed by its agent and sealed where it belongs, too.
pub(crate) fn run(input: &[u8]) {
    let Some((mode, rest)) = input.split_first() else { return };
    let plaintext = if mode & 0x80 == 0 { padded(rest) } else { rest.to_vec() };
    let Fixed { world, member, .. } = fixed();
    let (id, signer) = (member.id(), &world.signer);
    match mode % 3 {
        0 => {
            let place = Place { object: bytes("service"), agent: id, epoch: 0, counter: 7 };
            if let Some(record) = service(&plaintext, place) {
                let object = record.object();
                let signed = member.identity.sign(object);
                service(&padded(&signed.encode()), place_of_service(object));
            }
        }
        1 => {
            let place = Place { object: id.0, agent: id, epoch: 0, counter: 3 };
            if let Some(record) = agent(&plaintext, place) {
                let signed = member.identity.sign(record.object());
                agent(&padded(&signed.encode()), place_of_agent(record.object()));
            }
        }
        _ => {
            if let Some(record) = share(&plaintext, CredentialId([0x5a; 16])) {
                let signed = signer.sign(record.object());
                share(&padded(&signed.encode()), record.object().share_id);
            }
        }
    }
    // The whole input as it would come from the hub: nobody without the key has anything that opens.
    let sealed = SealedRecord { epoch: 0, counter: 3, sealed: Blob(input.to_vec()) };
    let opened = fixed().keys.open_agent(&world.workspace, id, &member.identity.public(), &sealed);
    assert_eq!(opened.err(), Some(CryptoError::Open));
}

/// A well-formed input of each kind.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let Fixed { world, member, .. } = fixed();
    let seed = |mode: u8, wire: Vec<u8>| [&[mode], wire.as_slice()].concat();
    let service = member.identity.sign(&world.service_record(member)).encode();
    let agent = member.identity.sign(&world.agent_record(member)).encode();
    let share = world.signer.sign(&ShareRecord {
        workspace_id: world.workspace,
        share_id: CredentialId([0x5a; 16]),
        label: "for Ann".parse().expect("a label"),
        names: vec!["prod-db".parse().expect("a name")],
    });
    vec![
        ("plaintext", seed(0x81, padded(&agent))),
        ("agent", seed(1, agent)),
        ("service", seed(0, service)),
        ("share", seed(2, share.encode())),
    ]
}
