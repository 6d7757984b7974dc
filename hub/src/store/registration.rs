//! The table `registration_tokens`: who may create a workspace.

use std::time::Duration;

use connect_spec::control::RegistrationToken;
use sha2::{Digest as _, Sha256};
use sqlx::postgres::PgConnection;

use super::{StoreError, WorkspaceTx};

/// What the table keeps of a token. It holds 256 random bits, so a plain hash is enough.
fn token_hash(token: &RegistrationToken) -> [u8; 32] {
    Sha256::digest(token.0.as_bytes()).into()
}

/// Stores a token that lets its bearer create one workspace within `valid_for`.
///
/// # Errors
/// [`StoreError::Database`].
pub async fn create_token(
    connection: &mut PgConnection,
    token: &RegistrationToken,
    valid_for: Duration,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO connect.registration_tokens (token_hash, expires_at)
         VALUES ($1, now() + make_interval(secs => $2))",
    )
    .bind(token_hash(token).as_slice())
    .bind(valid_for.as_secs_f64())
    .execute(connection)
    .await?;
    Ok(())
}

impl WorkspaceTx {
    /// Spends a token in this transaction; false when it is unknown, spent or expired.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn spend_registration_token(
        &mut self,
        token: &RegistrationToken,
    ) -> Result<bool, StoreError> {
        let (spent,): (bool,) = sqlx::query_as("SELECT connect.spend_registration_token($1)")
            .bind(token_hash(token).as_slice())
            .fetch_one(self.connection())
            .await?;
        Ok(spent)
    }
}
