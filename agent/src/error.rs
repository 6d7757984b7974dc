//! What can go wrong, in the terms of whoever has to act on it.

use std::{fmt, time::Duration};

use connect_spec::control::{ErrorCode, ErrorReport};

/// The kind of an error, which is also the exit code of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// Anything that no other kind names.
    Other,
    /// The command or a value in it is wrong.
    Usage,
    /// This home has not joined a workspace.
    NotEnrolled,
    /// The hub cannot be reached, or is not a hub.
    HubUnreachable,
    /// No service of that name.
    ServiceNotFound,
    /// The peer, or the hub, said no.
    Refused,
    /// A key, certificate, pin or record did not verify. Never retried by itself.
    TrustViolation,
    /// The exposed target did not answer.
    TargetUnreachable,
    /// No agent is running in this home.
    NoAgent,
    /// The service is known, but its exposer is offline.
    ExposerOffline,
}

impl ErrorKind {
    /// The exit code of a command that ends with this kind of error.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Other => 1,
            Self::Usage => 2,
            Self::NotEnrolled => 3,
            Self::HubUnreachable => 4,
            Self::ServiceNotFound => 5,
            Self::Refused => 6,
            Self::TrustViolation => 7,
            Self::TargetUnreachable => 8,
            Self::NoAgent => 9,
            Self::ExposerOffline => 10,
        }
    }
}

/// An error that says what happened, to what, and, where that is known, what to do next.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Error {
    /// What kind of error, for programs.
    #[serde(rename = "code")]
    pub kind: ErrorKind,
    /// What happened, for people.
    #[serde(rename = "error")]
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the other side only had too much to do: the same try may succeed in a moment.
    #[serde(skip)]
    pub(crate) busy: bool,
    /// After which time the hub wants to see this agent again.
    #[serde(skip)]
    pub(crate) retry_in: Option<Duration>,
    /// Whether a packet of a tunnel did not open: it was altered on the way, or made up.
    #[serde(skip)]
    pub(crate) altered: bool,
}

/// The result of everything here that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        Self {
            kind,
            message: message.to_string(),
            hint: None,
            busy: false,
            retry_in: None,
            altered: false,
        }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    pub(crate) fn trust(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::TrustViolation, message).hint(
            "the hub, or someone on the way, may be changing what peers say; if you did not expect \
             this, ask the other side to compare and report it",
        )
    }

    /// What the hub answered, in this program's terms. A hint: the hub is not believed for trust.
    pub(crate) fn from_hub(report: &ErrorReport) -> Self {
        let kind = match report.code {
            ErrorCode::NotFound => ErrorKind::ServiceNotFound,
            ErrorCode::Offline | ErrorCode::Timeout => ErrorKind::ExposerOffline,
            ErrorCode::Restarting | ErrorCode::Internal => ErrorKind::HubUnreachable,
            ErrorCode::BadRequest | ErrorCode::UnsupportedVersion => ErrorKind::Other,
            ErrorCode::WrongAuthority
            | ErrorCode::Unauthorized
            | ErrorCode::UnknownWorkspace
            | ErrorCode::RegistrationClosed
            | ErrorCode::AlreadyExists
            | ErrorCode::InviteUnknown
            | ErrorCode::InviteUsed
            | ErrorCode::InviteExpired
            | ErrorCode::Clone
            | ErrorCode::Stale
            | ErrorCode::NameTaken
            | ErrorCode::Forbidden
            | ErrorCode::Busy
            | ErrorCode::RateLimited
            | ErrorCode::IssuerUnknown
            | ErrorCode::Refused
            | ErrorCode::Displaced
            | ErrorCode::Conflict
            | ErrorCode::Revoked
            | ErrorCode::UpgradeNeeded
            | ErrorCode::Unknown => ErrorKind::Refused,
        };
        if report.code == ErrorCode::Clone {
            tracing::error!(
                event = "clone",
                "the hub knows another key of this agent: its home was copied; stop the copy"
            );
        }
        let mut error =
            Self::new(kind, format_args!("the hub says: {}", one_line(&report.message)));
        error.busy = matches!(report.code, ErrorCode::Busy | ErrorCode::RateLimited);
        error.retry_in = report.retry_in_ms.map(|millis| Duration::from_millis(millis.into()));
        match hint(report) {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// What to do about what the hub answered.
fn hint(report: &ErrorReport) -> Option<String> {
    let code = report.code;
    let hint = if matches!(
        code,
        ErrorCode::InviteUsed | ErrorCode::InviteExpired | ErrorCode::InviteUnknown
    ) {
        "ask for a new code: `connect invite` on a machine of the workspace"
    } else if code == ErrorCode::RegistrationClosed {
        "ask the hub's operator for a token (`connect-hub registration-token create`) and set \
         CONNECT_REGISTRATION_TOKEN to it"
    } else if code == ErrorCode::WrongAuthority {
        "dial the hub by a name that it was started with, or add this one with `--public-url`"
    } else if code == ErrorCode::Clone {
        "stop the copy and remove it. If you made none, somebody has the keys of this agent: join again \
         with an empty home"
    } else if code == ErrorCode::Stale {
        "was this home restored from an older copy? Use the newest one, or join again with an empty home"
    } else if code == ErrorCode::Revoked {
        "a signer of the workspace ended this; ask for a new code, and join with an empty home"
    } else if code == ErrorCode::NameTaken {
        let agent = report.agent_id.map_or_else(|| "its agent".into(), |id| id.short());
        return Some(format!(
            "choose another `--name`, or run `connect unexpose` on {agent}; if that one is gone for \
             good, `--take-over` takes the name"
        ));
    } else if matches!(code, ErrorCode::Busy | ErrorCode::RateLimited) {
        return Some(match report.retry_in_ms {
            Some(millis) => {
                format!("nothing is wrong here; try again in {} s", millis.div_ceil(1000))
            }
            None => {
                "the hub's limits are its operator's choice; see what can be removed".to_owned()
            }
        });
    } else {
        return None;
    };
    Some(hint.to_owned())
}

/// Text of another party, made safe to print: no line breaks, no escapes, not endless.
fn one_line(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(300).collect()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(ErrorKind::Other, error)
    }
}
