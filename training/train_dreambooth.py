from coeff_diffusers.training.run.dreambooth import main_command

if __name__ == "__main__":
    main_command()
