"""What the tests of training share."""


def losses_of(model, kind, steps, loss_of):
    """The losses of so many steps of an optimizer of this kind over what requires a gradient."""
    optimizer = kind((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
