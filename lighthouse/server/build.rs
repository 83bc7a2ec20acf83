//! Generates the gRPC code from `proto/` without a system protoc.
//!
//! The lighthouse's quorum reply is replaced by [`crate::wire::EncodedQuorum`], whose field holds
//! the quorum as already encoded bytes: a quorum is encoded once, whatever the number of replies.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../../proto";
    println!("cargo:rerun-if-changed={root}");
    let descriptors = protox::compile(["torchft.proto"], [root])?;
    tonic_prost_build::configure()
        .extern_path(
            ".torchft.LighthouseQuorumResponse",
            "crate::wire::EncodedQuorum",
        )
        .compile_fds(descriptors)?;
    Ok(())
}
