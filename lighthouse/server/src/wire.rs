//! The generated messages and services, and the one message that is written by hand.

use bytes::Bytes;
use prost::Message;

pub use proto::*;

#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
mod proto {
    tonic::include_proto!("torchft");
}

/// `LighthouseQuorumResponse` on the wire: a length-delimited field holds either a message or its
/// bytes, so the quorum is encoded once and every reply shares it.
#[derive(Clone, PartialEq, Message)]
pub struct EncodedQuorum {
    /// The encoded [`Quorum`].
    #[prost(bytes = "bytes", tag = "1")]
    pub quorum: Bytes,
}

impl EncodedQuorum {
    /// Encodes a quorum, once.
    #[must_use]
    pub fn of(quorum: &Quorum) -> Self {
        let quorum = quorum.encode_to_vec().into();
        Self { quorum }
    }

    /// Reads the quorum back.
    ///
    /// # Errors
    /// The bytes are no quorum.
    pub fn decode_quorum(&self) -> Result<Quorum, prost::DecodeError> {
        Quorum::decode(self.quorum.clone())
    }
}
