//! The name of a service that nobody named: what its target speaks, made unique in the workspace.

use connect_spec::ids::ServiceName;

use crate::{
    agent::Agent,
    directory::Directory,
    error::{Error, ErrorKind, Result},
    exposer::Exposed,
    probe::probe,
    target::Target,
};

/// `postgres-100` is the last try: whoever has more of them names them.
const MAX_NUMBER: u32 = 100;

/// What is spoken at a target: by its port where that means something, else by asking there; `tcp` when
/// neither says.
pub(crate) async fn protocol_of(target: &Target) -> String {
    match target.protocol() {
        "tcp" => probe(target).await.protocol.as_str().to_owned(),
        by_port => by_port.to_owned(),
    }
}

/// The names for a target that speaks this, in the order in which they are tried.
pub(crate) fn candidates(target: &Target, protocol: &str) -> impl Iterator<Item = ServiceName> {
    let stem = stem(target, protocol);
    (1..=MAX_NUMBER).map(move |number| {
        let name = if number == 1 { stem.clone() } else { format!("{stem}-{number}") };
        name.parse().expect("protocols, ports and numbers make names")
    })
}

fn stem(target: &Target, protocol: &str) -> String {
    match protocol {
        // Of a protocol inside TLS nothing is known.
        "tcp" | "tls" => format!("tcp-{}", target.port()),
        protocol => protocol.to_owned(),
    }
}

/// The service that this agent exposes from the same target under a name that was made here: exposing it
/// again is exposing the same.
pub(crate) fn exposed_before<'s>(
    services: impl IntoIterator<Item = &'s Exposed>,
    target: &Target,
) -> Option<&'s Exposed> {
    services.into_iter().find(|service| {
        service.target == *target
            && [service.protocol(), "tcp"].iter().any(|protocol| {
                let stem = stem(target, protocol);
                let rest = service.name.as_str().strip_prefix(&stem);
                rest.is_some_and(|rest| {
                    rest.is_empty()
                        || rest
                            .strip_prefix('-')
                            .is_some_and(|number| number.parse::<u32>().is_ok())
                })
            })
    })
}

impl Agent {
    /// Whether a name can be taken by this agent for a new service.
    ///
    /// # Errors
    /// Why the hub cannot be asked.
    pub(crate) async fn is_free(&self, name: &ServiceName) -> Result<bool> {
        if self.core().exposer.all().iter().any(|service| service.name == *name) {
            return Ok(false);
        }
        let session = self.core().session().await?;
        match Directory::new(self.core().workspace.clone(), session).find(name).await {
            // Left from a run that was killed: this agent may use it.
            Ok(found) => Ok(found.record.agent_id == self.agent_id()),
            Err(error) if error.kind == ErrorKind::ServiceNotFound => Ok(true),
            // Somebody has it, whatever is wrong there.
            Err(error) if error.kind == ErrorKind::TrustViolation => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Nothing is left to try.
pub(crate) fn none_free(target: &Target, protocol: &str) -> Error {
    let stem = stem(target, protocol);
    Error::new(ErrorKind::Refused, format_args!("`{stem}` to `{stem}-{MAX_NUMBER}` are all taken"))
        .hint("choose a name: `--name`")
}

#[cfg(test)]
mod tests {
    use connect_spec::ids::ServiceId;

    use super::*;

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_the_protocol_and_then_numbered() {
        let check = |at: &str, protocol: &str, expected: [&str; 3]| {
            let found: Vec<_> = candidates(&target(at), protocol).take(3).collect();
            assert_eq!(found.iter().map(ServiceName::as_str).collect::<Vec<_>>(), expected);
        };
        check("15432", "postgres", ["postgres", "postgres-2", "postgres-3"]);
        check("9000", "tcp", ["tcp-9000", "tcp-9000-2", "tcp-9000-3"]);
        check("9000", "tls", ["tcp-9000", "tcp-9000-2", "tcp-9000-3"]);
        assert_eq!(candidates(&target("9000"), "redis").count(), 100);
    }

    #[test]
    fn a_target_is_known_again_by_a_name_that_was_made_for_it() {
        let check = |name: &str, protocol: &str, at: &str, expected: bool| {
            let id = ServiceId([1; 16]);
            let name = name.parse().unwrap();
            let exposed = Exposed::new(name, id, target("15432"), Default::default())
                .speaking(Some(protocol.to_owned()));
            assert_eq!(exposed_before([&exposed], &target(at)).is_some(), expected);
        };
        check("postgres", "postgres", "15432", true);
        check("postgres-7", "postgres", "localhost:15432", true);
        check("tcp-15432", "postgres", "15432", true);
        check("postgres", "postgres", "15433", false);
        check("postgres-main", "postgres", "15432", false);
        check("prod-db", "postgres", "15432", false);
    }
}
