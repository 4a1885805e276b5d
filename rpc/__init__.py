"""What every gRPC process here needs around its servicer; no knowledge of inference or samples."""
