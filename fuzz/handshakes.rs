//! Both messages of a handshake, by a peer that holds every key and says what it likes: a payload of any
//! bytes inside a message that opens.

use std::sync::OnceLock;

use connect_crypto::handshake::{AwaitReply, HandshakeError, Received, Reply, initiate, receive};
use connect_spec::{
    handshake::Payload,
    hash::hash,
    keys::ML_KEM_768_EK_BYTES,
    limits::{HANDSHAKE_PADDING, MAX_HANDSHAKE_BYTES},
    objects::SUITE_1,
    prologue::{Prologue, Realm},
    trust::VerifiedPeer,
};
use ml_kem::{Encapsulate as _, KeyExport as _, ml_kem_768};

use crate::{
    noise::{Shared, Symmetric, after_static_keys, answer, dh, public},
    world::{Agent, NOW, TestRng, World, bytes},
};

struct Fixed {
    world: World,
    initiator: Agent,
    responder: Agent,
    prologue: Prologue,
    /// What comes before the payload in message 1, and the state that seals it.
    first: (Vec<u8>, Symmetric),
    /// The same of the message 2 that answers [`Fixed::initiate`].
    second: (Vec<u8>, Symmetric),
    /// The encapsulation key of that handshake, which is as good as any other.
    encapsulation_key: Box<[u8; ML_KEM_768_EK_BYTES]>,
}

fn fixed() -> &'static Fixed {
    static FIXED: OnceLock<Fixed> = OnceLock::new();
    FIXED.get_or_init(Fixed::new)
}

/// What `initiate` draws: the seed of its decapsulation key, and its ephemeral secret.
fn drawn() -> ([u8; 64], [u8; 32]) {
    let mut rng = TestRng::new("initiate");
    let (mut seed, mut ephemeral) = ([0; 64], [0; 32]);
    rand_core::Rng::fill_bytes(&mut rng, &mut seed);
    rand_core::Rng::fill_bytes(&mut rng, &mut ephemeral);
    (seed, ephemeral)
}

impl Fixed {
    fn new() -> Self {
        let world = World::new();
        let (initiator, responder) = (world.member("initiator"), world.member("responder"));
        let prologue = world.prologue(&initiator, &responder);
        let theirs = *responder.static_keypair.public().as_bytes();
        let ours = initiator.static_keypair.secret();
        let begun = |ephemeral: &[u8; 32]| {
            let (ephemeral, initiator) =
                (Shared::of(ephemeral, &theirs), Shared::of(ours, &theirs));
            after_static_keys(&prologue.encode(), &theirs, &ephemeral, &initiator)
        };
        let first = begun(&bytes("ephemeral"));

        let (seed, ephemeral) = drawn();
        let key = ml_kem_768::DecapsulationKey::from_seed(seed.into());
        let key = key.encapsulation_key();
        let encapsulation_key: Box<[u8; ML_KEM_768_EK_BYTES]> = Box::new(key.to_bytes().into());
        let mut rng = TestRng::new("encapsulate");
        let (ciphertext, kem_secret) = key.encapsulate_with_rng(&mut rng);

        let (sent, mut state) = begun(&ephemeral);
        let payload = payload(&world, &initiator, Some(encapsulation_key.clone()));
        let message1 = [sent, state.encrypt_and_hash(&payload)].concat();
        let local = world.local(&initiator);
        let (_, begun) = initiate(
            &local,
            &prologue,
            &responder.static_keypair.public(),
            &mut TestRng::new("initiate"),
        )
        .expect("both keys are sound");
        assert_eq!(message1, begun, "two implementations of one message");

        let psk = hash(
            "psk",
            &[
                &SUITE_1.to_be_bytes(),
                &[Realm::Member.number()],
                world.epoch.realm.as_bytes().as_slice(),
                &kem_secret,
                &hash("ek", &[encapsulation_key.as_slice()]),
                &hash("ct", &[&ciphertext]),
            ],
        );
        let answering: [u8; 32] = bytes("answering");
        let shared = [&ephemeral, ours].map(|key| dh(&answering, &public(key)));
        answer(&mut state, &public(&answering), [&shared[0], &shared[1]], &psk);
        let second = ([&ciphertext[..], &public(&answering)].concat(), state);
        Self { world, initiator, responder, prologue, first, second, encapsulation_key }
    }

    /// The same each time.
    fn initiate(&self) -> AwaitReply {
        let to = self.responder.static_keypair.public();
        let rng = &mut TestRng::new("initiate");
        initiate(&self.world.local(&self.initiator), &self.prologue, &to, rng)
            .expect("it was begun so before")
            .0
    }

    fn peer(&self, agent: &Agent) -> VerifiedPeer {
        let verified = self.world.trust.verify_peer(agent.id(), agent.presented.clone(), NOW);
        verified.expect("a member")
    }
}

fn payload(
    world: &World,
    agent: &Agent,
    encapsulation_key: Option<Box<[u8; ML_KEM_768_EK_BYTES]>>,
) -> Vec<u8> {
    let (presented, attrs) = (agent.presented.clone(), agent.attrs.clone());
    let payload = Payload { presented, attrs, head: world.head(), encapsulation_key };
    payload.encode().expect("it fits")
}

/// What a payload is worth to a reader that wants the encapsulation key, or must not see one.
fn expected(
    payload: &[u8],
    message_bytes: usize,
    with_key: bool,
) -> Result<Payload, HandshakeError> {
    if message_bytes > MAX_HANDSHAKE_BYTES {
        return Err(HandshakeError::Malformed);
    }
    let mut payload = Payload::decode(payload).map_err(|_| HandshakeError::Malformed)?;
    match payload.encapsulation_key.take().is_some() {
        key if key == with_key => Ok(payload),
        _ => Err(HandshakeError::Kem),
    }
}

/// What a verified peer that presented something else comes to.
fn confirmed(agent: &Agent, payload: &Payload) -> Result<(), HandshakeError> {
    if payload.presented != agent.presented {
        return Err(HandshakeError::Peer);
    }
    if payload.attrs.hash() == agent.presented.certificate.object().attrs {
        Ok(())
    } else {
        Err(HandshakeError::Attributes)
    }
}

fn message1(inside: &[u8]) {
    let fixed = fixed();
    let (sent, state) = &fixed.first;
    let message = [sent.as_slice(), &state.clone().encrypt_and_hash(inside)].concat();
    let received = receive(&fixed.responder.static_keypair, &fixed.prologue, &message);
    let wanted = expected(inside, message.len(), true);
    assert_eq!(received.as_ref().map(Received::payload), wanted.as_ref());
    let Ok(received) = received else { return };
    let wanted = confirmed(&fixed.initiator, received.payload());
    let local = fixed.world.local(&fixed.responder);
    let peer = fixed.peer(&fixed.initiator);
    let answered = received.answer(&peer, &local, &mut TestRng::new("answer"));
    match (answered, wanted) {
        // The key may be one that nothing can be encapsulated to.
        (Ok(_) | Err(HandshakeError::Kem), Ok(())) => {}
        (answered, wanted) => assert_eq!(answered.err(), wanted.err()),
    }
}

fn message2(inside: &[u8]) {
    let fixed = fixed();
    let (sent, state) = &fixed.second;
    let sealed = [&sent[sent.len() - 32..], &state.clone().encrypt_and_hash(inside)].concat();
    let message = [&sent[..sent.len() - 32], &sealed].concat();
    let reply = fixed.initiate().read(&message);
    let wanted = expected(inside, sealed.len(), false);
    assert_eq!(reply.as_ref().map(Reply::payload), wanted.as_ref());
    let Ok(reply) = reply else { return };
    let wanted = confirmed(&fixed.responder, reply.payload());
    let confirmed = reply.confirm(&fixed.peer(&fixed.responder));
    assert_eq!(confirmed.err(), wanted.err());
}

/// `u16 length || map || zeros`.
fn padded(map: &[u8]) -> Vec<u8> {
    let length = u16::try_from(map.len()).unwrap_or(u16::MAX);
    let mut payload = [&length.to_be_bytes(), map].concat();
    payload.resize(payload.len().next_multiple_of(HANDSHAKE_PADDING), 0);
    payload
}

/// The first byte says which message it is, and what the others are of it: all of it, its payload, or
/// the fields in the payload.
pub(crate) fn run(input: &[u8]) {
    let Some((mode, rest)) = input.split_first() else { return };
    // Noise knows no message of more than 65,535 bytes; what is over 4096 is refused long before.
    let rest = &rest[..rest.len().min(2 * MAX_HANDSHAKE_BYTES)];
    let fixed = fixed();
    match mode % 6 {
        0 => message1(&padded(rest)),
        1 => message2(&padded(rest)),
        2 => message1(rest),
        3 => message2(rest),
        4 => {
            if let Ok(received) = receive(&fixed.responder.static_keypair, &fixed.prologue, rest) {
                // Somebody who knows the initiator's key wrote it: the corpus.
                assert_eq!(received.payload().presented, fixed.initiator.presented);
            }
        }
        _ => {
            if let Ok(reply) = fixed.initiate().read(rest) {
                assert_eq!(reply.payload().presented, fixed.responder.presented);
            }
        }
    }
}

/// A well-formed input of each kind.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let fixed = fixed();
    let key = Some(fixed.encapsulation_key.clone());
    let first = payload(&fixed.world, &fixed.initiator, key);
    let second = payload(&fixed.world, &fixed.responder, None);
    let map = |payload: &[u8]| {
        let length = usize::from(u16::from_be_bytes([payload[0], payload[1]]));
        payload[2..2 + length].to_vec()
    };
    let message = |(sent, state): &(Vec<u8>, Symmetric), payload: &[u8]| {
        [sent.as_slice(), &state.clone().encrypt_and_hash(payload)].concat()
    };
    let seed = |mode: u8, rest: Vec<u8>| [&[mode], rest.as_slice()].concat();
    vec![
        ("fields1", seed(0, map(&first))),
        ("fields2", seed(1, map(&second))),
        ("message1", seed(4, message(&fixed.first, &first))),
        ("message2", seed(5, message(&fixed.second, &second))),
        ("payload1", seed(2, first)),
        ("payload2", seed(3, second)),
    ]
}
