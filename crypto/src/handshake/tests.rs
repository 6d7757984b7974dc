//! What every deviation of a peer or of the hub comes to.

use connect_spec::{
    encoding::Encoding,
    ids::{AgentId, ChannelId, CredentialId, ServiceId, TunnelId, WorkspaceId},
};

use super::*;
use crate::test_world::{Agent, NOW, TestRng, World, bytes};

/// Two members about to open a tunnel.
struct Pair {
    world: World,
    initiator: Agent,
    responder: Agent,
    prologue: Prologue,
}

impl Pair {
    fn new() -> Self {
        let world = World::new();
        let (initiator, responder) = (world.member("initiator"), world.member("responder"));
        let prologue = world.prologue(&initiator, &responder);
        Self { world, initiator, responder, prologue }
    }

    /// The same messages each time.
    fn initiate(&self) -> (AwaitReply, Vec<u8>) {
        let local = self.world.local(&self.initiator);
        let to = self.responder.static_keypair.public();
        initiate(&local, &self.prologue, &to, &mut TestRng::new("initiate")).unwrap()
    }

    fn receive(&self, message1: &[u8]) -> Result<Received, HandshakeError> {
        receive(&self.responder.static_keypair, &self.prologue, message1)
    }

    fn answer(&self, received: Received) -> Result<(Transport, Vec<u8>), HandshakeError> {
        let peer = self.peer(&self.initiator);
        received.answer(&peer, &self.world.local(&self.responder), &mut TestRng::new("answer"))
    }

    fn peer(&self, agent: &Agent) -> VerifiedPeer {
        self.world.trust.verify_peer(agent.id(), agent.presented.clone(), NOW).unwrap()
    }

    fn messages(&self) -> (Vec<u8>, Vec<u8>) {
        let (_, message1) = self.initiate();
        let (_, message2) = self.answer(self.receive(&message1).unwrap()).unwrap();
        (message1, message2)
    }

    fn transports(&self) -> (Transport, Transport) {
        let (state, message1) = self.initiate();
        let (theirs, message2) = self.answer(self.receive(&message1).unwrap()).unwrap();
        let reply = state.read(&message2).unwrap();
        let ours = reply.confirm(&self.peer(&self.responder)).unwrap();
        (ours, theirs)
    }

    /// Message 1 of an initiator that ignores every rule but Noise's.
    fn hostile_message1(&self, sender: &StaticKeypair, payload: &[u8]) -> Vec<u8> {
        let slot = EphemeralSlot::default();
        slot.fill(&mut TestRng::new("hostile"));
        let prologue = self.prologue.encode();
        let mut noise = builder(&prologue, sender, &slot)
            .remote_public_key(self.responder.static_keypair.public().as_bytes())
            .unwrap()
            .build_initiator()
            .unwrap();
        write(&mut noise, payload).unwrap()
    }

    /// What a responder that ignores every rule but Noise's makes the initiator see.
    fn hostile_reply(&self, payload: &Payload) -> Result<Reply, HandshakeError> {
        let (state, message1) = self.initiate();
        let mut received = self.receive(&message1).unwrap();
        let rng = &mut TestRng::new("hostile");
        let (ciphertext, kem_secret) = kem::encapsulate(&received.encapsulation_key, rng).unwrap();
        let psk = psk(
            Realm::Member,
            self.world.epoch.realm.as_bytes(),
            &kem_secret,
            &received.encapsulation_key,
            &ciphertext,
        );
        received.noise.set_psk(PSK_POSITION, psk.as_slice()).unwrap();
        received.ephemeral.fill(rng);
        let message = write(&mut received.noise, &payload.encode().unwrap()).unwrap();
        state.read(&[ciphertext.as_slice(), &message].concat())
    }

    fn payload(&self, agent: &Agent, encapsulation_key: Option<kem::EncapsulationKey>) -> Payload {
        Payload {
            presented: agent.presented.clone(),
            attrs: agent.attrs.clone(),
            head: self.world.head(),
            encapsulation_key,
        }
    }
}

fn some_ek() -> kem::EncapsulationKey {
    Decapsulator::generate(&mut TestRng::new("ek")).encapsulation_key()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, HandshakeError>, expected: HandshakeError) {
    assert_eq!(result.err(), Some(expected));
}

#[test]
fn both_ends_agree_and_records_flow_both_ways() {
    let (ours, theirs) = Pair::new().transports();
    assert_eq!(ours.handshake_hash(), theirs.handshake_hash());
    let ((mut our_sealer, mut our_opener), (mut their_sealer, mut their_opener)) =
        (ours.split(), theirs.split());
    for number in 0..3u8 {
        let mut record = vec![number; 100];
        our_sealer.seal(&mut record, 0).unwrap();
        assert_eq!(their_opener.open(&mut record).unwrap(), [number; 100]);
        let mut record = vec![number; 7];
        their_sealer.seal(&mut record, 0).unwrap();
        assert_eq!(our_opener.open(&mut record).unwrap(), [number; 7]);
    }
}

#[test]
fn payloads_arrive_as_they_were_presented() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    let received = pair.receive(&message1).unwrap();
    assert_eq!(*received.payload(), pair.payload(&pair.initiator, None));
    let (_, message2) = pair.answer(received).unwrap();
    assert_eq!(*state.read(&message2).unwrap().payload(), pair.payload(&pair.responder, None));
}

#[test]
fn members_by_credential_shake_hands_too() {
    let mut pair = Pair::new();
    let admission = pair.world.admission("invite", connect_spec::objects::CredentialKind::Invite);
    pair.initiator = pair.world.joined("joiner", &admission);
    pair.responder = pair.world.joined("other joiner", &admission);
    pair.prologue = pair.world.prologue(&pair.initiator, &pair.responder);
    let (ours, theirs) = pair.transports();
    assert_eq!(ours.handshake_hash(), theirs.handshake_hash());
}

#[test]
fn every_changed_byte_of_message_1_is_refused() {
    let pair = Pair::new();
    let (_, message1) = pair.initiate();
    for position in 0..message1.len() {
        let mut changed = message1.clone();
        changed[position] ^= if position % 2 == 0 { 0x80 } else { 0x01 };
        refused(pair.receive(&changed), HandshakeError::Decrypt);
    }
}

#[test]
fn every_changed_byte_of_message_2_is_refused() {
    let pair = Pair::new();
    let (_, message2) = pair.messages();
    for position in 0..message2.len() {
        let mut changed = message2.clone();
        changed[position] ^= if position % 2 == 0 { 0x80 } else { 0x01 };
        refused(pair.initiate().0.read(&changed), HandshakeError::Decrypt);
    }
}

#[test]
fn truncated_messages_are_refused() {
    let pair = Pair::new();
    let (message1, message2) = pair.messages();
    for length in [0, 1, 31, 32, 33, 79, 80, 95, 96, message1.len() - 1] {
        refused(pair.receive(&message1[..length]), HandshakeError::Decrypt);
    }
    for length in [0, 1, 1087] {
        refused(pair.initiate().0.read(&message2[..length]), HandshakeError::Malformed);
    }
    for length in [1088, 1089, 1119, 1120, 1135, 1136, message2.len() - 1] {
        refused(pair.initiate().0.read(&message2[..length]), HandshakeError::Decrypt);
    }
}

#[test]
fn extended_messages_are_refused() {
    let pair = Pair::new();
    let (message1, message2) = pair.messages();
    for extra in [1, 16, 512] {
        let longer = |message: &[u8]| [message, &vec![0; extra]].concat();
        refused(pair.receive(&longer(&message1)), HandshakeError::Decrypt);
        refused(pair.initiate().0.read(&longer(&message2)), HandshakeError::Decrypt);
    }
}

#[test]
fn messages_over_the_limit_are_refused_unread() {
    let pair = Pair::new();
    refused(pair.receive(&[0; MAX_HANDSHAKE_BYTES + 1]), HandshakeError::Malformed);
    refused(pair.receive(&[0; MAX_HANDSHAKE_BYTES]), HandshakeError::Decrypt);
    let over = [0; ML_KEM_768_CT_BYTES + MAX_HANDSHAKE_BYTES + 1];
    refused(pair.initiate().0.read(&over), HandshakeError::Malformed);
    refused(pair.initiate().0.read(&over[1..]), HandshakeError::Decrypt);
}

#[test]
fn message_1_sent_back_is_no_message_2() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    refused(state.read(&message1), HandshakeError::Decrypt);
}

#[test]
fn message_2_of_another_handshake_is_refused() {
    let pair = Pair::new();
    let (_, message2) = pair.messages();
    let local = pair.world.local(&pair.initiator);
    let to = pair.responder.static_keypair.public();
    let (state, _) = initiate(&local, &pair.prologue, &to, &mut TestRng::new("another")).unwrap();
    refused(state.read(&message2), HandshakeError::Decrypt);
}

#[test]
fn a_replayed_message_1_gives_other_keys() {
    let pair = Pair::new();
    let (_, message1) = pair.initiate();
    let (ours, _) = pair.transports();
    let mut record = b"HELLO".to_vec();
    ours.split().0.seal(&mut record, 0).unwrap();

    let peer = pair.peer(&pair.initiator);
    let local = pair.world.local(&pair.responder);
    let received = pair.receive(&message1).unwrap();
    let (replayed, _) = received.answer(&peer, &local, &mut TestRng::new("later")).unwrap();
    assert!(replayed.split().1.open(&mut record).is_err());
}

#[test]
fn a_swapped_kem_ciphertext_is_refused() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    let ek = pair.receive(&message1).unwrap().encapsulation_key;
    let (_, mut message2) = pair.messages();
    let (other, _) = kem::encapsulate(&ek, &mut TestRng::new("other")).unwrap();
    message2[..ML_KEM_768_CT_BYTES].copy_from_slice(other.as_slice());
    refused(state.read(&message2), HandshakeError::Decrypt);
}

#[test]
fn a_swapped_static_key_opens_nothing() {
    let pair = Pair::new();
    let (_, message1) = pair.initiate();
    let other = StaticKeypair::from_secret(crate::test_world::secret("other static"));
    refused(receive(&other, &pair.prologue, &message1), HandshakeError::Decrypt);
}

#[test]
fn another_realm_secret_opens_nothing() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    let other = World::named("other");
    let local = Local { realm_secret: &other.epoch.realm, ..pair.world.local(&pair.responder) };
    let peer = pair.peer(&pair.initiator);
    let (_, message2) = pair
        .receive(&message1)
        .unwrap()
        .answer(&peer, &local, &mut TestRng::new("answer"))
        .unwrap();
    refused(state.read(&message2), HandshakeError::Decrypt);
}

#[test]
fn every_field_of_the_prologue_binds_message_1() {
    let pair = Pair::new();
    let (_, message1) = pair.initiate();
    let changes: [fn(&mut Prologue); 12] = [
        |prologue| prologue.workspace_id = WorkspaceId(bytes("other")),
        |prologue| prologue.tunnel_id = TunnelId(bytes("other")),
        |prologue| prologue.service_id = ServiceId(bytes("other")),
        |prologue| prologue.initiator = AgentId(bytes("other")),
        |prologue| prologue.responder = AgentId(bytes("other")),
        |prologue| prologue.share_id = CredentialId(bytes("other")),
        |prologue| prologue.channel_id = ChannelId(bytes("other")),
        |prologue| prologue.tunnel_no += 1,
        |prologue| prologue.rekey += 1,
        |prologue| prologue.previous_hash = bytes("other"),
        |prologue| prologue.realm = Realm::Share,
        |prologue| prologue.encoding = Encoding::Binary,
    ];
    for change in changes {
        let mut prologue = pair.prologue.clone();
        change(&mut prologue);
        let received = receive(&pair.responder.static_keypair, &prologue, &message1);
        refused(received, HandshakeError::Decrypt);
    }
    let mut swapped = pair.prologue.clone();
    std::mem::swap(&mut swapped.initiator, &mut swapped.responder);
    let received = receive(&pair.responder.static_keypair, &swapped, &message1);
    refused(received, HandshakeError::Decrypt);
}

/// A pair that rekeys after a handshake with this hash. Both draw anew, as they do outside tests.
fn rekey(pair: &Pair, previous_hash: [u8; 32]) -> (Transport, Transport) {
    let prologue = Prologue { rekey: 1, previous_hash, ..pair.prologue.clone() };
    let to = pair.responder.static_keypair.public();
    let local = pair.world.local(&pair.initiator);
    let (state, message1) =
        initiate(&local, &prologue, &to, &mut TestRng::new("initiate again")).unwrap();
    let received = receive(&pair.responder.static_keypair, &prologue, &message1).unwrap();
    let local = pair.world.local(&pair.responder);
    let peer = pair.peer(&pair.initiator);
    let (theirs, message2) =
        received.answer(&peer, &local, &mut TestRng::new("answer again")).unwrap();
    let ours = state.read(&message2).unwrap().confirm(&pair.peer(&pair.responder)).unwrap();
    (ours, theirs)
}

#[test]
fn keys_of_a_rekey_open_nothing_of_the_keys_before_and_the_other_way_round() {
    let pair = Pair::new();
    let (before, before_at_peer) = pair.transports();
    let (after, after_at_peer) = rekey(&pair, before.handshake_hash());
    assert_eq!(after.handshake_hash(), after_at_peer.handshake_hash());
    assert_ne!(after.handshake_hash(), before.handshake_hash());

    let (mut old_record, mut new_record) = (b"old".to_vec(), b"new".to_vec());
    before.split().0.seal(&mut old_record, 0).unwrap();
    after.split().0.seal(&mut new_record, 0).unwrap();
    let (_, mut old_opener) = before_at_peer.split();
    let (_, mut new_opener) = after_at_peer.split();
    // Each as the first record of its key, so that the counter is not what refuses it.
    assert!(new_opener.open(&mut old_record.clone()).is_err());
    assert!(old_opener.open(&mut new_record.clone()).is_err());

    let (before, before_at_peer) = pair.transports();
    let (_, after_at_peer) = rekey(&pair, before.handshake_hash());
    let ((_, mut old_opener), (_, mut new_opener)) =
        (before_at_peer.split(), after_at_peer.split());
    old_opener.open(&mut old_record).unwrap();
    new_opener.open(&mut new_record).unwrap();
}

#[test]
fn a_rekey_with_another_number_or_another_handshake_before_it_is_refused() {
    let pair = Pair::new();
    let (before, _) = pair.transports();
    let sound =
        Prologue { rekey: 1, previous_hash: before.handshake_hash(), ..pair.prologue.clone() };
    let to = pair.responder.static_keypair.public();
    let local = pair.world.local(&pair.initiator);
    let (_, message1) = initiate(&local, &sound, &to, &mut TestRng::new("initiate again")).unwrap();
    assert!(receive(&pair.responder.static_keypair, &sound, &message1).is_ok());
    let mut changed_hash = before.handshake_hash();
    changed_hash[31] ^= 1;
    for other in [
        Prologue { rekey: 0, ..sound.clone() },
        Prologue { rekey: 2, ..sound.clone() },
        Prologue { previous_hash: [0; 32], ..sound.clone() },
        Prologue { previous_hash: changed_hash, ..sound.clone() },
        pair.prologue.clone(),
    ] {
        let received = receive(&pair.responder.static_keypair, &other, &message1);
        refused(received, HandshakeError::Decrypt);
    }
    // Nor is the message that began the tunnel one that rekeys it.
    let (_, first) = pair.initiate();
    let received = receive(&pair.responder.static_keypair, &sound, &first);
    refused(received, HandshakeError::Decrypt);
}

#[test]
fn the_proof_must_be_about_the_initiator_of_the_prologue() {
    let pair = Pair::new();
    let (_, message1) = pair.initiate();
    let received = pair.receive(&message1).unwrap();
    let peer = pair.peer(&pair.world.member("third"));
    let local = pair.world.local(&pair.responder);
    refused(received.answer(&peer, &local, &mut TestRng::new("answer")), HandshakeError::Peer);
}

#[test]
fn the_proof_must_be_about_the_responder_of_the_prologue() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    let (_, message2) = pair.answer(pair.receive(&message1).unwrap()).unwrap();
    let reply = state.read(&message2).unwrap();
    refused(reply.confirm(&pair.peer(&pair.world.member("third"))), HandshakeError::Peer);
}

/// An agent that presents itself where the prologue names another.
#[test]
fn the_proof_of_another_agent_than_the_prologue_names_is_refused_at_both_ends() {
    let mut pair = Pair::new();
    let third = pair.world.member("third").id();
    let sound = pair.prologue.clone();
    pair.prologue.initiator = third;
    let (_, message1) = pair.initiate();
    refused(pair.answer(pair.receive(&message1).unwrap()), HandshakeError::Peer);

    pair.prologue = Prologue { responder: third, ..sound };
    let (state, message1) = pair.initiate();
    let (_, message2) = pair.answer(pair.receive(&message1).unwrap()).unwrap();
    let reply = state.read(&message2).unwrap();
    refused(reply.confirm(&pair.peer(&pair.responder)), HandshakeError::Peer);
}

#[test]
fn every_part_of_the_psk_counts() {
    let (secret, other) = ([1; 32], [2; 32]);
    let (key, other_key) = ([3; ML_KEM_768_EK_BYTES], [4; ML_KEM_768_EK_BYTES]);
    let (ciphertext, other_ciphertext) = ([5; ML_KEM_768_CT_BYTES], [6; ML_KEM_768_CT_BYTES]);
    let sound = psk(Realm::Member, &secret, &secret, &key, &ciphertext);
    for changed in [
        psk(Realm::Share, &secret, &secret, &key, &ciphertext),
        psk(Realm::Member, &other, &secret, &key, &ciphertext),
        psk(Realm::Member, &secret, &other, &key, &ciphertext),
        psk(Realm::Member, &secret, &secret, &other_key, &ciphertext),
        psk(Realm::Member, &secret, &secret, &key, &other_ciphertext),
    ] {
        assert_ne!(changed, sound);
    }
}

#[test]
fn the_proof_must_be_about_what_was_presented() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    let (_, message2) = pair.answer(pair.receive(&message1).unwrap()).unwrap();
    let reply = state.read(&message2).unwrap();

    // The same agent, but with a NoiseKey that the handshake did not carry.
    let mut rotated = pair.world.member("responder");
    let other = StaticKeypair::from_secret(crate::test_world::secret("rotated"));
    let identity = rotated.identity.public();
    rotated.presented.noise_key =
        rotated.identity.sign(&pair.world.noise_key(&identity, &other, &rotated.wrap));
    refused(reply.confirm(&pair.peer(&rotated)), HandshakeError::Peer);
}

#[test]
fn an_initiator_with_another_agents_objects_is_refused() {
    let pair = Pair::new();
    // It holds the realm secret and the objects of a member, but not that member's static key.
    let thief = StaticKeypair::from_secret(crate::test_world::secret("thief"));
    let payload = pair.payload(&pair.initiator, Some(some_ek())).encode().unwrap();
    let received = pair.receive(&pair.hostile_message1(&thief, &payload)).unwrap();
    refused(pair.answer(received), HandshakeError::StaticKey);
}

#[test]
fn a_responder_that_the_hub_swapped_in_is_refused() {
    let mut pair = Pair::new();
    let objects = pair.world.member("responder");
    let prologue = pair.world.prologue(&pair.initiator, &objects);
    // The hub named its own static key, and presents the true responder's objects.
    pair.responder.static_keypair = StaticKeypair::from_secret(crate::test_world::secret("hub"));
    pair.prologue = prologue;
    let reply = pair.hostile_reply(&pair.payload(&objects, None)).unwrap();
    refused(reply.confirm(&pair.peer(&objects)), HandshakeError::StaticKey);
}

#[test]
fn tags_that_do_not_open_are_refused_at_both_ends() {
    let pair = Pair::new();
    let mut payload = pair.payload(&pair.initiator, Some(some_ek()));
    payload.attrs.tags = vec!["admin".to_owned()];
    let message1 =
        pair.hostile_message1(&pair.initiator.static_keypair, &payload.encode().unwrap());
    refused(pair.answer(pair.receive(&message1).unwrap()), HandshakeError::Attributes);

    let mut payload = pair.payload(&pair.responder, None);
    payload.attrs.salt[0] ^= 1;
    let reply = pair.hostile_reply(&payload).unwrap();
    refused(reply.confirm(&pair.peer(&pair.responder)), HandshakeError::Attributes);
}

#[test]
fn a_missing_encapsulation_key_is_no_fallback() {
    let pair = Pair::new();
    let payload = pair.payload(&pair.initiator, None).encode().unwrap();
    let message1 = pair.hostile_message1(&pair.initiator.static_keypair, &payload);
    refused(pair.receive(&message1), HandshakeError::Kem);
}

#[test]
fn an_encapsulation_key_that_is_not_canonical_is_refused() {
    let pair = Pair::new();
    let ek = Box::new([0xff; ML_KEM_768_EK_BYTES]);
    let payload = pair.payload(&pair.initiator, Some(ek)).encode().unwrap();
    let message1 = pair.hostile_message1(&pair.initiator.static_keypair, &payload);
    refused(pair.answer(pair.receive(&message1).unwrap()), HandshakeError::Kem);
}

#[test]
fn an_encapsulation_key_in_message_2_is_refused() {
    let pair = Pair::new();
    let payload = pair.payload(&pair.responder, Some(some_ek()));
    refused(pair.hostile_reply(&payload), HandshakeError::Kem);
}

#[test]
fn payloads_that_are_no_payload_are_refused() {
    let pair = Pair::new();
    let sound = pair.payload(&pair.initiator, Some(some_ek())).encode().unwrap();
    let mut padded = sound.clone();
    *padded.last_mut().unwrap() = 1;
    let longer = [sound.as_slice(), &[0; 512]].concat();
    for payload in [&[][..], &[0; 512], &sound[..sound.len() - 512], &padded, &longer] {
        let message1 = pair.hostile_message1(&pair.initiator.static_keypair, payload);
        refused(pair.receive(&message1), HandshakeError::Malformed);
    }
}

#[test]
fn a_responder_key_of_small_order_is_refused() {
    let pair = Pair::new();
    let local = pair.world.local(&pair.initiator);
    let mut one = [0; 32];
    one[0] = 1;
    for low in [[0; 32], one] {
        let begun =
            initiate(&local, &pair.prologue, &StaticPublicKey(low), &mut TestRng::new("low"));
        refused(begun, HandshakeError::StaticKey);
    }
}

#[test]
fn an_agent_does_not_present_a_key_that_it_does_not_use() {
    let pair = Pair::new();
    let other = StaticKeypair::from_secret(crate::test_world::secret("other static"));
    let local = Local { static_keypair: &other, ..pair.world.local(&pair.initiator) };
    let to = pair.responder.static_keypair.public();
    let begun = initiate(&local, &pair.prologue, &to, &mut TestRng::new("initiate"));
    refused(begun, HandshakeError::StaticKey);

    let (_, message1) = pair.initiate();
    let received = pair.receive(&message1).unwrap();
    let peer = pair.peer(&pair.initiator);
    let local = pair.world.local(&pair.initiator);
    refused(received.answer(&peer, &local, &mut TestRng::new("answer")), HandshakeError::StaticKey);
}

#[test]
fn no_step_prints_what_it_holds() {
    let pair = Pair::new();
    let (state, message1) = pair.initiate();
    assert_eq!(format!("{state:?}"), "AwaitReply(..)");
    let received = pair.receive(&message1).unwrap();
    assert_eq!(format!("{received:?}"), "Received(..)");
    let (transport, message2) = pair.answer(received).unwrap();
    assert_eq!(format!("{transport:?}"), "Transport(..)");
    assert_eq!(format!("{:?}", state.read(&message2).unwrap()), "Reply(..)");
    let (sealer, opener) = transport.split();
    assert_eq!(format!("{sealer:?} {opener:?}"), "Sealer(..) Opener(..)");
}
