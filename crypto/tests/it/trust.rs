use connect_crypto::keys::SigningKey;
use connect_spec::{
    ids::{AgentId, ServiceId, WorkspaceId},
    objects::{
        AgentRole, Certificate, CredentialKind, Founder, Genesis, Issuer, NoiseKey, SUITE_1,
        SignerRole, UnixTime,
    },
    signed::Signed,
    trust::{TrustError, TrustState, VerifiedPeer},
};

use crate::common::{Admission, Agent, DAY, NOW, World, bytes, secret};

fn verify(world: &World, agent: &Agent, now: UnixTime) -> Result<VerifiedPeer, TrustError> {
    world.trust.verify_peer(agent.id(), agent.presented.clone(), now)
}

#[track_caller]
fn refused(world: &World, agent: &Agent, expected: TrustError) {
    assert_eq!(verify(world, agent, NOW).err(), Some(expected));
}

/// A member whose certificate the signer signed after `change`.
fn certified(world: &World, change: impl FnOnce(&mut Certificate)) -> Agent {
    let mut agent = world.member("agent");
    let mut certificate = world.certificate(&agent.identity, &agent.attrs);
    change(&mut certificate);
    agent.presented.certificate = world.signer.sign(&certificate);
    agent
}

/// A joiner whose certificate the invite key signed after `change`.
fn joined(world: &World, admission: &Admission, change: impl FnOnce(&mut Certificate)) -> Agent {
    let mut agent = world.joined("joiner", admission);
    let mut certificate = world.joining(admission, &agent.identity);
    change(&mut certificate);
    agent.presented.certificate = admission.keys.signing.sign(&certificate);
    agent
}

/// A member whose identity signed the NoiseKey after `change`.
fn keyed(world: &World, change: impl FnOnce(&mut NoiseKey)) -> Agent {
    let mut agent = world.member("agent");
    let mut noise_key = agent.presented.noise_key.object().clone();
    change(&mut noise_key);
    agent.presented.noise_key = agent.identity.sign(&noise_key);
    agent
}

#[test]
fn members_by_signer_and_by_credential_are_accepted() {
    let world = World::new();
    let member = world.member("agent");
    let peer = verify(&world, &member, NOW).unwrap();
    assert_eq!(peer.agent_id(), member.id());
    assert_eq!(peer.static_key(), member.static_keypair.public());
    assert_eq!((peer.credential_id(), peer.services()), (None, None));

    let admission = world.admission("invite", CredentialKind::Invite);
    let joiner = world.joined("joiner", &admission);
    let peer = verify(&world, &joiner, NOW).unwrap();
    assert_eq!(peer.credential_id(), Some(admission.credential.object().id()));
    assert_eq!(peer.certificate().role, AgentRole::Member);

    let share = world.admission("share", CredentialKind::Share);
    let guest = world.joined("guest", &share);
    let peer = verify(&world, &guest, NOW).unwrap();
    assert_eq!(peer.certificate().role, AgentRole::Guest);
    assert_eq!(peer.services(), Some([ServiceId(bytes("service"))].as_slice()));
}

#[test]
fn what_was_signed_survives_the_wire() {
    let world = World::new();
    let admission = world.admission("invite", CredentialKind::Invite);
    let mut joiner = world.joined("joiner", &admission);
    joiner.presented =
        connect_spec::trust::Presented::from_blobs(&joiner.presented.to_blobs()).unwrap();
    assert!(verify(&world, &joiner, NOW).is_ok());
}

#[test]
fn objects_of_another_workspace_are_refused() {
    let world = World::new();
    let other = WorkspaceId(bytes("other"));
    refused(&world, &certified(&world, |c| c.workspace_id = other), TrustError::Workspace);
    refused(&world, &keyed(&world, |key| key.workspace_id = other), TrustError::Workspace);
    refused(&world, &World::named("other").member("agent"), TrustError::Workspace);

    let admission = world.admission("invite", CredentialKind::Invite);
    let mut foreign = admission.credential.object().clone();
    foreign.workspace_id = other;
    let foreign = Admission { credential: world.signer.sign(&foreign), ..admission };
    refused(&world, &world.joined("joiner", &foreign), TrustError::Workspace);
    assert_eq!(world.trust.verify_credential(&foreign.credential), Err(TrustError::Workspace));
}

#[test]
fn an_agent_is_nobody_else() {
    let world = World::new();
    let (agent, other) = (world.member("agent"), world.member("other"));
    let judged = world.trust.verify_peer(other.id(), agent.presented.clone(), NOW);
    assert_eq!(judged.err(), Some(TrustError::Agent));

    // Another agent's certificate with one's own NoiseKey, and the other way round.
    let mut thief = world.member("agent");
    thief.presented.certificate = other.presented.certificate.clone();
    let judged = world.trust.verify_peer(other.id(), thief.presented.clone(), NOW);
    assert_eq!(judged.err(), Some(TrustError::NoiseKey));
    let judged = world.trust.verify_peer(agent.id(), thief.presented.clone(), NOW);
    assert_eq!(judged.err(), Some(TrustError::Agent));
}

#[test]
fn the_static_key_is_bound_by_the_identity_alone() {
    let world = World::new();
    let mut swapped = world.member("agent");
    swapped.presented.noise_key = world.member("other").presented.noise_key;
    refused(&world, &swapped, TrustError::NoiseKey);

    let other = AgentId(bytes("other"));
    refused(&world, &keyed(&world, |key| key.agent_id = other), TrustError::NoiseKey);

    let mut by_another = world.member("agent");
    let noise_key = by_another.presented.noise_key.object().clone();
    for signer in [&world.signer, &world.member("other").identity] {
        by_another.presented.noise_key = signer.sign(&noise_key);
        refused(&world, &by_another, TrustError::NoiseKey);
    }

    // Two signatures, the right one among them, are not the one signature.
    let identity = &by_another.identity;
    let body = connect_spec::signed::Body::encode(&noise_key);
    let sign = |key: &SigningKey| (key.public(), key.sign_text("noise-key", &body));
    by_another.presented.noise_key =
        Signed::new(body.clone(), vec![sign(identity), sign(&world.signer)]).unwrap();
    refused(&world, &by_another, TrustError::NoiseKey);

    // The identity's signature over another kind of text.
    by_another.presented.noise_key = Signed::new(
        body.clone(),
        vec![(identity.public(), identity.sign_text("certificate", &body))],
    )
    .unwrap();
    refused(&world, &by_another, TrustError::NoiseKey);
}

#[test]
fn only_signers_issue() {
    let world = World::new();
    let stranger = SigningKey::from_seed(secret("stranger"));
    let mut agent = certified(&world, |c| c.issuer = Issuer::Signer(stranger.public()));
    let certificate = agent.presented.certificate.object().clone();
    refused(&world, &agent, TrustError::IssuerUnknown);
    agent.presented.certificate = stranger.sign(&certificate);
    refused(&world, &agent, TrustError::IssuerUnknown);

    // Names the signer, but is signed by the stranger or by the agent itself.
    let mut agent = world.member("agent");
    let certificate = agent.presented.certificate.object().clone();
    agent.presented.certificate = stranger.sign(&certificate);
    refused(&world, &agent, TrustError::Certificate);
    agent.presented.certificate = agent.identity.sign(&certificate);
    refused(&world, &agent, TrustError::Certificate);

    // The recovery key is no signer.
    let recovery = world.recovery.public();
    let agent = certified(&world, |c| c.issuer = Issuer::Signer(recovery));
    refused(&world, &agent, TrustError::IssuerUnknown);
}

#[test]
fn signers_issue_members_only() {
    let world = World::new();
    let guest = certified(&world, |c| c.role = AgentRole::Guest);
    refused(&world, &guest, TrustError::Exceeds);
    let services = Some(vec![ServiceId(bytes("service"))]);
    refused(&world, &certified(&world, |c| c.services = services), TrustError::Exceeds);
    assert!(verify(&world, &certified(&world, |c| c.role = AgentRole::Reacher), NOW).is_ok());
}

#[test]
fn a_credential_beside_a_signers_certificate_is_refused() {
    let world = World::new();
    let mut agent = world.member("agent");
    let admission = world.admission("invite", CredentialKind::Invite);
    agent.presented.credential = Some(admission.credential);
    refused(&world, &agent, TrustError::IssuerUnknown);
}

#[test]
fn the_credential_must_be_there_and_be_the_one() {
    let world = World::new();
    let admission = world.admission("invite", CredentialKind::Invite);
    let mut joiner = world.joined("joiner", &admission);
    joiner.presented.credential = None;
    refused(&world, &joiner, TrustError::IssuerUnknown);
    joiner.presented.credential = Some(world.admission("other", CredentialKind::Invite).credential);
    refused(&world, &joiner, TrustError::IssuerUnknown);
}

#[test]
fn a_credential_by_no_signer_is_refused() {
    let world = World::new();
    let stranger = SigningKey::from_seed(secret("stranger"));
    let admission = world.admission("invite", CredentialKind::Invite);

    // Names the stranger as its issuer.
    let mut credential = admission.credential.object().clone();
    credential.issuer = stranger.public();
    let by_stranger = Admission { credential: stranger.sign(&credential), ..admission };
    refused(&world, &world.joined("joiner", &by_stranger), TrustError::Credential);

    // Names the signer, signed by the stranger or by the invite key itself.
    let credential = by_stranger.keys.signing.public();
    let admission = world.admission("invite", CredentialKind::Invite);
    assert_eq!(admission.keys.signing.public(), credential);
    let body = admission.credential.object().clone();
    for signer in [&stranger, &admission.keys.signing] {
        let mut joiner = world.joined("joiner", &admission);
        joiner.presented.credential = Some(signer.sign(&body));
        refused(&world, &joiner, TrustError::Credential);
    }
}

#[test]
fn a_certificate_by_another_key_than_the_invites_is_refused() {
    let world = World::new();
    let admission = world.admission("invite", CredentialKind::Invite);
    let mut joiner = world.joined("joiner", &admission);
    let certificate = joiner.presented.certificate.object().clone();
    let other = world.admission("other", CredentialKind::Invite);
    for signer in [&joiner.identity, &world.signer, &other.keys.signing] {
        joiner.presented.certificate = signer.sign(&certificate);
        refused(&world, &joiner, TrustError::Certificate);
    }
}

#[test]
fn a_certificate_claims_no_more_and_no_less_than_its_credential() {
    let world = World::new();
    let invite = world.admission("invite", CredentialKind::Invite);
    let share = world.admission("share", CredentialKind::Share);
    type Case<'a> = (&'a Admission, fn(&mut Certificate));
    let cases: [Case<'_>; 8] = [
        (&invite, |c| c.role = AgentRole::Exposer),
        (&invite, |c| c.role = AgentRole::Guest),
        (&invite, |c| c.attrs = bytes("other")),
        (&invite, |c| c.services = Some(Vec::new())),
        (&share, |c| c.role = AgentRole::Member),
        (&share, |c| c.services = None),
        (&share, |c| c.services = Some(vec![ServiceId(bytes("other"))])),
        (&share, |c| {
            c.services.as_mut().unwrap().push(ServiceId(bytes("other")));
        }),
    ];
    for (admission, change) in cases {
        refused(&world, &joined(&world, admission, change), TrustError::Exceeds);
    }
}

#[test]
fn certificates_and_credentials_end() {
    let world = World::new();
    #[track_caller]
    fn ends_after(world: &World, agent: &Agent, last: UnixTime) {
        assert!(verify(world, agent, last).is_ok());
        assert_eq!(verify(world, agent, last + 1).err(), Some(TrustError::Expired));
    }
    // Members have a day of tolerance, guests none.
    let end = NOW + 90 * DAY;
    let invite = world.admission("invite", CredentialKind::Invite);
    ends_after(&world, &world.joined("joiner", &invite), end + DAY);
    let share = world.admission("share", CredentialKind::Share);
    ends_after(&world, &world.joined("guest", &share), end);
    ends_after(&world, &certified(&world, |c| c.not_after = Some(NOW)), NOW + DAY);
    ends_after(&world, &joined(&world, &invite, |c| c.not_after = Some(NOW)), NOW + DAY);
    let never = certified(&world, |c| c.not_after = Some(UnixTime::MAX));
    assert!(verify(&world, &never, UnixTime::MAX).is_ok());
}

#[test]
fn a_genesis_is_the_one_that_the_anchor_names() {
    let world = World::new();
    let from = |genesis: &Signed<Genesis>, anchor| TrustState::from_genesis(anchor, genesis).err();
    assert_eq!(from(&world.genesis, WorkspaceId(bytes("other"))), Some(TrustError::Genesis));

    // The same body, signed by another, or by the founder over another kind of text.
    let stranger = SigningKey::from_seed(secret("stranger"));
    let forged = stranger.sign(world.genesis.object());
    assert_eq!(forged.hash(), world.genesis.hash());
    assert_eq!(from(&forged, world.workspace), Some(TrustError::Genesis));
    let body = connect_spec::signed::Body::encode(world.genesis.object());
    let signature = world.signer.sign_text("certificate", &body);
    let forged = Signed::new(body, vec![(world.signer.public(), signature)]).unwrap();
    assert_eq!(from(&forged, world.workspace), Some(TrustError::Genesis));
}

#[test]
fn every_founder_must_have_signed() {
    let world = World::new();
    let second = SigningKey::from_seed(secret("second"));
    let founder = |key: &SigningKey| Founder { key: key.public(), role: SignerRole::Owner };
    let mut founders = vec![founder(&world.signer), founder(&second)];
    founders.sort_by_key(|founder| founder.key);
    let genesis = Genesis {
        suite: SUITE_1,
        salt: bytes("salt"),
        founders,
        recovery_key: world.recovery.public(),
        epoch_commit: world.epoch.commit(),
    };
    let body = connect_spec::signed::Body::encode(&genesis);
    let sign = |key: &SigningKey| (key.public(), key.sign_text("genesis", &body));
    let judge = |signatures| {
        let genesis: Signed<Genesis> = Signed::new(body.clone(), signatures).unwrap();
        TrustState::from_genesis(WorkspaceId(genesis.hash()), &genesis)
    };
    assert!(judge(vec![sign(&world.signer), sign(&second)]).is_ok());
    let stranger = SigningKey::from_seed(secret("stranger"));
    for signatures in [
        vec![sign(&world.signer)],
        vec![sign(&second)],
        vec![sign(&world.signer), sign(&stranger)],
        vec![sign(&world.signer), sign(&second), sign(&stranger)],
        vec![sign(&world.signer), (second.public(), sign(&world.signer).1)],
    ] {
        assert_eq!(judge(signatures).err(), Some(TrustError::Genesis));
    }
}
